//! The budget of the kernel object: no panic symbol, at most 400 bytes of stack along any call chain, and at
//! most 60% of the verifier's million instructions.

use std::{collections::BTreeMap, fs, process::Command};

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection, ObjectSymbol, RelocationTarget, SymbolKind};

use crate::bpf;

/// The kernel allows 512 bytes for a whole call chain (`MAX_BPF_STACK`).
const MAX_STACK: u32 = 400;

/// Checks the built object, and how the running kernel's verifier takes it (needs root).
pub(crate) fn check() -> Result<()> {
    let path = bpf::object_path();
    let bytes = fs::read(&path)
        .with_context(|| format!("cannot read {}; build it with `make build`", path.display()))?;
    check_object(&bytes)?;
    let status = Command::new("cargo")
        .args(["run", "--quiet", "-p", "podway-bpf-host", "--example", "budget"])
        .current_dir(crate::root())
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("the kernel object is over its budget on the running kernel");
    }
    Ok(())
}

/// Checks what can be read from the object itself.
pub(crate) fn check_object(bytes: &[u8]) -> Result<()> {
    let file = object::File::parse(bytes).context("the kernel object is no ELF file")?;
    let panics: Vec<&str> = file
        .symbols()
        .filter_map(|s| s.name().ok())
        .filter(|name| name.contains("panic") || name.contains("rust_begin_unwind"))
        .collect();
    if !panics.is_empty() {
        bail!("the kernel object can panic; symbols: {}", panics.join(", "));
    }
    let functions = functions(&file)?;
    println!("{:<14} {:>13} {:>17}", "program", "instructions", "stack (of 512)");
    let mut worst = 0;
    for ((section, _), function) in &functions {
        if function.is_program {
            let depth = depth(&functions, section, function, 0)?;
            println!("{:<14} {:>13} {:>11} bytes", function.name, function.instructions, depth);
            worst = worst.max(depth);
        }
    }
    if functions.values().all(|f| !f.is_program) {
        bail!("the kernel object holds no program");
    }
    if worst > MAX_STACK {
        bail!("{worst} bytes of stack are over the budget of {MAX_STACK}");
    }
    println!("no panic symbol; most stack {worst} bytes, budget {MAX_STACK}");
    Ok(())
}

/// A function by (section, address).
type Functions = BTreeMap<(usize, u64), Function>;

struct Function {
    name: String,
    /// A program of its own, not a subprogram.
    is_program: bool,
    instructions: usize,
    /// Bytes of its own frame.
    frame: u32,
    /// (section, address) of what it calls.
    calls: Vec<(usize, u64)>,
}

fn functions(file: &object::File<'_>) -> Result<Functions> {
    let mut all = Functions::new();
    for symbol in file.symbols().filter(|s| s.kind() == SymbolKind::Text && s.size() > 0) {
        let Some(index) = symbol.section_index() else { continue };
        let section = file.section_by_index(index)?;
        let data = section.data()?;
        let (start, end) = (symbol.address(), symbol.address() + symbol.size());
        let relocations: BTreeMap<u64, (usize, u64)> = section
            .relocations()
            .filter_map(|(offset, relocation)| {
                let RelocationTarget::Symbol(target) = relocation.target() else { return None };
                let target = file.symbol_by_index(target).ok()?;
                Some((offset, (target.section_index()?.0, target.address())))
            })
            .collect();
        let code =
            usize::try_from(start).ok().zip(usize::try_from(end).ok()).and_then(|(s, e)| data.get(s..e));
        let code =
            code.with_context(|| format!("{} lies outside its section", symbol.name().unwrap_or("?")))?;
        let mut function = Function {
            name: symbol.name()?.to_owned(),
            is_program: section.name()? != ".text",
            instructions: code.len() / 8,
            frame: 0,
            calls: Vec::new(),
        };
        scan(code, start, index.0, &relocations, &mut function);
        all.insert((index.0, start), function);
    }
    Ok(all)
}

/// Instruction classes and codes (RFC 9669).
mod op {
    pub(super) const CLASS: u8 = 0x07;
    pub(super) const LDX: u8 = 0x01;
    pub(super) const ST: u8 = 0x02;
    pub(super) const STX: u8 = 0x03;
    pub(super) const MOV64_REG: u8 = 0xbf;
    pub(super) const ADD64_IMM: u8 = 0x07;
    pub(super) const CALL: u8 = 0x85;
    /// Source register of a call to a function of the same object.
    pub(super) const PSEUDO_CALL: u8 = 1;
    /// The frame pointer.
    pub(super) const FP: u8 = 10;
}

/// Collects the frame's size and the calls. The frame is as deep as the lowest address that is used directly
/// or made by adding to a copy of the frame pointer.
fn scan(
    code: &[u8],
    start: u64,
    section: usize,
    relocations: &BTreeMap<u64, (usize, u64)>,
    function: &mut Function,
) {
    // Registers that hold a copy of the frame pointer.
    let mut copies = [false; 16];
    for (i, insn) in code.chunks_exact(8).enumerate() {
        let (code, dst, src) = (insn[0], insn[1] & 0x0f, insn[1] >> 4);
        let offset = i16::from_le_bytes([insn[2], insn[3]]);
        let imm = i32::from_le_bytes([insn[4], insn[5], insn[6], insn[7]]);
        let mut reach = |below: i32| {
            if below < 0 {
                function.frame = function.frame.max(below.unsigned_abs());
            }
        };
        match code & op::CLASS {
            op::ST | op::STX if dst == op::FP => reach(offset.into()),
            op::LDX if src == op::FP => reach(offset.into()),
            _ => {}
        }
        match code {
            op::MOV64_REG => copies[usize::from(dst)] = src == op::FP,
            op::ADD64_IMM if copies[usize::from(dst)] => {
                reach(imm);
                copies[usize::from(dst)] = false;
            }
            op::CALL if src == op::PSEUDO_CALL => {
                let at = start + i as u64 * 8;
                // Within .text the target is relative to the next instruction, in instructions; across
                // sections the relocation's symbol is the section and the immediate counts from its start.
                let relative = i64::from(imm) + 1;
                let target = match relocations.get(&at) {
                    Some((to, base)) => (*to, base.wrapping_add_signed(relative * 8)),
                    None => (section, at.wrapping_add_signed(relative * 8)),
                };
                function.calls.push(target);
            }
            _ => {}
        }
    }
}

fn depth(functions: &Functions, section: &usize, function: &Function, level: u32) -> Result<u32> {
    // The kernel allows eight frames (`MAX_CALL_FRAMES`).
    if level > 8 {
        bail!("{} calls too deep", function.name);
    }
    let mut deepest = 0;
    for call in &function.calls {
        let callee = functions.get(call).with_context(|| {
            format!("{} (section {section}) calls an unknown function at {call:?}", function.name)
        })?;
        deepest = deepest.max(depth(functions, &call.0, callee, level + 1)?);
    }
    // The verifier rounds each frame up to 32 bytes where the JIT is in use.
    Ok(function.frame.next_multiple_of(32) + deepest)
}
