//! The machine's root: a shell, the tools and the tests of this machine with the libraries that they need, the
//! kernel's modules, and the script that runs it all.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use super::{cpio::Archive, init, modules::Module};
use crate::tests::Program;

/// Where the test programs are in the machine.
pub(super) const PROGRAMS: &str = "tests";

/// Tools that tests and probes call, from this machine, because the shell's own versions are not the real ones.
const TOOLS: &[&str] = &["ip", "tc", "nft", "xtables-legacy-multi", "xtables-nft-multi"];

/// The two programs that are all of iptables, and the names under which they are called.
const IPTABLES: [&str; 2] = ["legacy", "nft"];

/// Where iptables has what its options mean.
const EXTENSIONS: &str = "usr/lib/x86_64-linux-gnu/xtables";

/// A tool that is not installed on this machine but unpacked from a package.
pub(super) struct Unpacked {
    /// Its path in the package.
    pub(super) program: &'static str,
    /// Where the package and those of its libraries are unpacked.
    pub(super) roots: Vec<PathBuf>,
}

/// Commands of the one binary that is the machine's shell.
const APPLETS: &[&str] = &[
    "sh", "cat", "echo", "grep", "hostname", "insmod", "ls", "mkdir", "mount", "poweroff", "ps", "readlink",
    "sleep", "stty", "sysctl", "timeout", "uname",
];

/// What is the same for every kernel: all but the modules and the script. Read once, so that every kernel runs the
/// same programs even when somebody builds meanwhile. Files on the way to it go to `directory`.
pub(super) fn common(
    busybox: &Path,
    unpacked: &[Unpacked],
    programs: &[Program],
    directory: &Path,
) -> Result<Archive> {
    let scratch = directory.join(format!("stripped-{}", std::process::id()));
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "run", "tmp", "var", "etc", "root", "modules"] {
        archive.directory(directory)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    archive.file("bin/busybox", 0o755, &read(busybox)?)?;
    for applet in APPLETS {
        archive.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    let mut libraries = BTreeSet::new();
    for tool in TOOLS {
        let found = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(|d| Path::new(d).join(tool));
        let Some(file) = found.into_iter().find(|f| f.is_file()) else {
            bail!("{tool} is not on this machine; run `sudo make setup`");
        };
        libraries.extend(needed_libraries(&file, &[])?);
        archive.file(&format!("usr/sbin/{tool}"), 0o755, &read(&file)?)?;
    }
    iptables(&mut archive)?;
    for Unpacked { program, roots } in unpacked {
        let file = roots.iter().map(|r| r.join(program)).find(|f| f.is_file());
        let file = file.with_context(|| format!("no package that was unpacked holds {program}"))?;
        libraries.extend(needed_libraries(&file, roots)?);
        archive.file(program, 0o755, &read(&file)?)?;
    }
    for program in programs {
        libraries.extend(needed_libraries(&program.executable, &[])?);
        archive.file(
            &format!("{PROGRAMS}/{}", file_name(program)),
            0o755,
            &stripped(&program.executable, &scratch)?,
        )?;
    }
    for library in libraries {
        // Under the name by which it is looked for, whatever it links to; from where it is, for one of a package.
        let mut roots = unpacked.iter().flat_map(|u| &u.roots);
        let inside = roots.find_map(|root| library.strip_prefix(root).ok()).unwrap_or(&library);
        let name = inside.to_str().context("a library's path is no text")?.trim_start_matches('/').to_owned();
        archive.file(&name, 0o755, &read(&library)?)?;
    }
    Ok(archive)
}

/// Adds the names of iptables' programs, and what they load.
fn iptables(archive: &mut Archive) -> Result<()> {
    for backend in IPTABLES {
        for family in ["iptables", "ip6tables"] {
            for command in ["", "-save", "-restore"] {
                let name = format!("usr/sbin/{family}-{backend}{command}");
                archive.symlink(&name, &format!("xtables-{backend}-multi"))?;
            }
        }
    }
    let from = Path::new("/").join(EXTENSIONS);
    let entries = fs::read_dir(&from)
        .with_context(|| format!("cannot read {}; run `sudo make setup`", from.display()))?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().into_string().ok().context("an extension's name is no text")?;
        // Those of arptables and ebtables are not called by anybody here.
        if ["libxt_", "libipt_", "libip6t_"].iter().any(|kind| name.starts_with(kind)) {
            archive.file(&format!("{EXTENSIONS}/{name}"), 0o755, &read(&entry.path())?)?;
        }
    }
    Ok(())
}

/// The archive for a kernel with these modules.
pub(super) fn build(common: &Archive, modules: &[Module], programs: &[Program]) -> Result<Vec<u8>> {
    let mut archive = common.clone();
    for module in modules {
        archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.object)?;
    }
    let names: Vec<&str> = modules.iter().map(|m| m.name.as_str()).collect();
    archive.file("init", 0o755, init::script(&names, programs).as_bytes())?;
    archive.finish()
}

/// A program's name in the machine.
pub(super) fn file_name(program: &Program) -> String {
    program.label().replace(": ", "-")
}

/// The interpreter and the libraries that a program is loaded with, asked of the interpreter itself. Libraries of
/// unpacked packages go before those of this machine.
fn needed_libraries(program: &Path, roots: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let Some(interpreter) =
        interpreter(&read(program)?).with_context(|| format!("{}: not an ELF program", program.display()))?
    else {
        return Ok(Vec::new());
    };
    let output = Command::new(&interpreter)
        .arg("--library-path")
        .arg(library_path(roots))
        .arg("--list")
        .arg(program)
        .output()
        .with_context(|| format!("cannot run {}", interpreter.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{}: cannot list its libraries: {}", program.display(), text.trim());
    }
    let mut libraries = parse_list(&text).with_context(|| format!("libraries of {}", program.display()))?;
    libraries.push(interpreter);
    Ok(libraries)
}

/// The directories of libraries in unpacked packages, as the loader takes them.
fn library_path(roots: &[PathBuf]) -> String {
    let directories = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
    let all = roots.iter().flat_map(|root| directories.map(|d| root.join(d).display().to_string()));
    all.collect::<Vec<_>>().join(":")
}

/// Reads what the loader lists: `name => path (address)`, or `path (address)`.
fn parse_list(text: &str) -> Result<Vec<PathBuf>> {
    let mut libraries = Vec::new();
    for line in text.lines().map(str::trim) {
        let path = line.split_once(" => ").map_or(line, |(_, path)| path);
        let path = path.split(" (").next().unwrap_or_default();
        if path.starts_with('/') {
            libraries.push(PathBuf::from(path));
        } else if path.contains("not found") {
            bail!("{line}");
        }
    }
    Ok(libraries)
}

/// The path in the `PT_INTERP` header; none in a static program.
fn interpreter(bytes: &[u8]) -> Result<Option<PathBuf>> {
    use object::{LittleEndian, elf, read::elf::FileHeader, read::elf::ProgramHeader};
    let header = elf::FileHeader64::<LittleEndian>::parse(bytes)?;
    let endian = header.endian()?;
    for segment in header.program_headers(endian, bytes)? {
        if let Some(path) = segment.interpreter(endian, bytes)? {
            return Ok(Some(PathBuf::from(String::from_utf8_lossy(path).into_owned())));
        }
    }
    Ok(None)
}

/// A program without its debug information, which is most of it and would fill the machine's memory.
fn stripped(program: &Path, scratch: &Path) -> Result<Vec<u8>> {
    let output = Command::new("strip")
        .arg("--strip-debug")
        .arg("-o")
        .args([scratch, program])
        .output()
        .context("cannot run strip; run `sudo make setup`")?;
    if !output.status.success() {
        bail!("strip failed for {}: {}", program.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    let bytes = read(scratch)?;
    fs::remove_file(scratch).with_context(|| format!("cannot remove {}", scratch.display()))?;
    Ok(bytes)
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaders_list_is_read() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let wanted = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(parse_list(text).unwrap(), wanted);
        assert!(parse_list("\tlibmissing.so => not found\n").unwrap_err().to_string().contains("libmissing"));
    }

    #[test]
    fn this_very_program_names_its_interpreter() {
        let own = read(Path::new("/proc/self/exe")).unwrap();
        let interpreter = interpreter(&own).unwrap().unwrap();
        assert!(interpreter.is_file(), "{interpreter:?}");
        assert!(needed_libraries(&std::env::current_exe().unwrap(), &[]).unwrap().contains(&interpreter));
    }
}
