//! Kernels as Debian packages them: found, downloaded and unpacked under `target/vm`, nothing installed.

use std::{
    cmp::Reverse,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

/// A kernel package, unpacked.
pub(super) struct Kernel {
    /// As `uname -r` says it: `6.1.0-56-cloud-amd64`.
    pub(super) release: String,
    /// The package's version: `6.1.192-2`.
    pub(super) version: String,
    /// The bootable image.
    pub(super) image: PathBuf,
    /// `lib/modules/<release>` of the package.
    pub(super) modules: PathBuf,
}

/// The newest cloud kernel of a series (`6.1`), or `None` where apt offers none and none was downloaded before.
pub(super) fn find(series: &str, directory: &Path) -> Result<Option<Kernel>> {
    if series.is_empty() || !series.split('.').all(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    {
        bail!("--kernel {series}: not a kernel series; it looks like 6.1");
    }
    let pattern = format!("^linux-image-{}[.0-9+a-z-]*-cloud-amd64$", series.replace('.', "\\."));
    let offered = Command::new("apt-cache")
        .args(["search", "--names-only", &pattern])
        .output()
        .context("cannot run apt-cache; this command needs Debian's packages")?;
    let offered = String::from_utf8_lossy(&offered.stdout).into_owned();
    let offered = offered.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned);
    let downloaded =
        file_names(directory)?.into_iter().filter_map(|f| f.split('_').next().map(str::to_owned));
    let Some(package) = newest(series, offered.chain(downloaded)) else { return Ok(None) };
    let archive = package_file(&package, directory)?;
    let kernel = unpack_kernel(&archive, directory)?;
    remove_others(series, &kernel.release, directory)?;
    Ok(Some(kernel))
}

/// Removes what older kernels of the same series left: packages, roots and logs.
fn remove_others(series: &str, release: &str, directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let entry = entry?;
        let name = entry.file_name().into_string().unwrap_or_default();
        let of = name.strip_prefix("linux-image-").unwrap_or(&name);
        if of.starts_with(&format!("{series}.")) && !of.starts_with(release) {
            let path = entry.path();
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// The file of a package, downloaded unless it is there.
pub(super) fn package_file(package: &str, directory: &Path) -> Result<PathBuf> {
    let there = || -> Result<Option<PathBuf>> {
        let wanted = format!("{package}_");
        let found =
            file_names(directory)?.into_iter().filter(|f| f.starts_with(&wanted) && f.ends_with(".deb"));
        Ok(found.max().map(|f| directory.join(f)))
    };
    if let Some(file) = there()? {
        return Ok(file);
    }
    println!("downloading {package}");
    let output = Command::new("apt-get")
        .args(["download", "--quiet", package])
        .current_dir(directory)
        .output()
        .context("cannot run apt-get")?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("cannot download {package}; run `sudo apt-get update` and try again: {}", why.trim());
    }
    there()?.with_context(|| format!("apt-get downloaded no file of {package}"))
}

/// Unpacks a package beside its file, once; returns where.
pub(super) fn unpack(archive: &Path) -> Result<PathBuf> {
    let to = archive.with_extension("");
    if to.exists() {
        return Ok(to);
    }
    // Under another name until it is whole.
    let partial = archive.with_extension("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    let status = Command::new("dpkg-deb")
        .arg("--extract")
        .args([archive, &partial])
        .status()
        .context("cannot run dpkg-deb")?;
    if !status.success() {
        bail!("cannot unpack {}; remove it and try again", archive.display());
    }
    fs::rename(&partial, &to).with_context(|| format!("cannot rename {}", partial.display()))?;
    Ok(to)
}

fn unpack_kernel(archive: &Path, directory: &Path) -> Result<Kernel> {
    let name = archive.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let mut fields = name.split('_');
    let release = fields.next().and_then(|p| p.strip_prefix("linux-image-")).unwrap_or_default().to_owned();
    let version = fields.next().unwrap_or_default().replace("%3a", ":");
    let root = unpack(&directory.join(name))?;
    let image = root.join(format!("boot/vmlinuz-{release}"));
    let modules = ["lib/modules", "usr/lib/modules"].map(|d| root.join(d).join(&release));
    let modules = modules.into_iter().find(|d| d.is_dir());
    match modules {
        Some(modules) if image.is_file() => Ok(Kernel { release, version, image, modules }),
        _ => bail!("{} holds no kernel {release} with modules", archive.display()),
    }
}

/// The newest of a series among names of packages.
fn newest(series: &str, packages: impl Iterator<Item = String>) -> Option<String> {
    let start = format!("linux-image-{series}.");
    packages
        .filter(|p| p.starts_with(&start) && p.ends_with("-cloud-amd64"))
        .min_by_key(|p| Reverse(numbers(p)))
}

/// The numbers in a name, as what it is ordered by: `6.1.0-9` is older than `6.1.0-56`.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

fn file_names(directory: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    Ok(entries
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|f| f.ends_with(".deb"))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_a_series_is_chosen_by_number() {
        let offered = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.1.0-57-cloud-amd64-unsigned",
            "linux-image-6.12.99+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12.118+deb12-cloud-amd64-dbg",
            "linux-image-6.12-cloud-amd64",
        ];
        let newest = |series| newest(series, offered.iter().map(ToString::to_string));
        assert_eq!(newest("6.1").as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(newest("6.12").as_deref(), Some("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(newest("6.6"), None);
    }

    #[test]
    fn older_kernels_of_a_series_are_removed_and_nothing_else() {
        let directory = std::env::temp_dir().join(format!("pwt-vm-{}", std::process::id()));
        let keep = [
            "6.1.0-56-cloud-amd64",
            "6.12.9-cloud-amd64.cpio",
            "busybox-static_1_amd64.deb",
            "linux-image-6.1.0-56-cloud-amd64_6.1.192-2_amd64.deb",
            "linux-image-6.12.9-cloud-amd64_6.12.9_amd64.deb",
        ];
        let remove = ["6.1.0-9-cloud-amd64.cpio", "linux-image-6.1.0-9-cloud-amd64_6.1.9_amd64.deb"];
        fs::create_dir_all(directory.join("linux-image-6.1.0-9-cloud-amd64_6.1.9_amd64")).unwrap();
        for name in keep.iter().chain(&remove) {
            fs::write(directory.join(name), "").unwrap();
        }
        remove_others("6.1", "6.1.0-56-cloud-amd64", &directory).unwrap();
        let mut left: Vec<_> = fs::read_dir(&directory).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!(left, keep);
    }

    #[test]
    fn a_series_that_is_none_is_refused() {
        for series in ["", "six", "6.", "6.1.*", "6.1-cloud"] {
            let error = find(series, Path::new("/nonexistent")).err().map(|e| e.to_string());
            assert!(
                error.as_deref().is_some_and(|e| e.contains("not a kernel series")),
                "{series}: {error:?}"
            );
        }
    }
}
