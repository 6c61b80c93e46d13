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
const TOOLS: &[&str] = &["ip", "tc", "nft"];

/// Commands of the one binary that is the machine's shell.
const APPLETS: &[&str] = &[
    "sh", "cat", "echo", "grep", "hostname", "insmod", "ls", "mkdir", "mount", "poweroff", "ps", "readlink",
    "sleep", "stty", "timeout", "uname",
];

/// What is the same for every kernel: all but the modules and the script. Read once, so that every kernel runs the
/// same programs even when somebody builds meanwhile. Files on the way to it go to `directory`.
pub(super) fn common(busybox: &Path, programs: &[Program], directory: &Path) -> Result<Archive> {
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
        libraries.extend(needed_libraries(&file)?);
        archive.file(&format!("usr/sbin/{tool}"), 0o755, &read(&file)?)?;
    }
    for program in programs {
        libraries.extend(needed_libraries(&program.executable)?);
        archive.file(
            &format!("{PROGRAMS}/{}", file_name(program)),
            0o755,
            &stripped(&program.executable, &scratch)?,
        )?;
    }
    for library in libraries {
        // Under the name by which it is looked for, whatever it links to.
        let name =
            library.to_str().context("a library's path is no text")?.trim_start_matches('/').to_owned();
        archive.file(&name, 0o755, &read(&library)?)?;
    }
    Ok(archive)
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

/// The interpreter and the libraries that a program is loaded with, asked of the interpreter itself.
fn needed_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let Some(interpreter) =
        interpreter(&read(program)?).with_context(|| format!("{}: not an ELF program", program.display()))?
    else {
        return Ok(Vec::new());
    };
    let output = Command::new(&interpreter)
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
        assert!(needed_libraries(&std::env::current_exe().unwrap()).unwrap().contains(&interpreter));
    }
}
