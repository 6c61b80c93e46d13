//! `podway lab apply` and `podway lab delete`: manifests into a running lab, and out of it.

use podway_lab::apply;
use podway_lab::client::Client;
use podway_lab::manifest::{Loaded, Problem};
use podway_lab::up;

use super::{pick, runtime};
use crate::args::Manifests;
use crate::output;
use crate::{FAILED, OK};

pub(super) fn apply(args: &Manifests) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    let loaded = load(args)?;
    let applied = runtime()?.block_on(async { up::fill(&mut Client::of_lab(&lab)?, &loaded).await })?;
    notes(&applied.notes);
    let code = left_out(&loaded, &applied.problems);
    output::print(&format!("{} objects created, {} updated\n", applied.created, applied.replaced));
    Ok(code)
}

pub(super) fn delete(args: &Manifests) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    let loaded = load(args)?;
    let deleted =
        runtime()?.block_on(async { apply::delete(&mut Client::of_lab(&lab)?, &loaded.objects).await })?;
    notes(&deleted.notes);
    let code = left_out(&loaded, &deleted.problems);
    output::print(&format!(
        "{} objects deleted, {} were not there\n",
        deleted.deleted.len(),
        deleted.absent.len()
    ));
    Ok(code)
}

fn load(args: &Manifests) -> anyhow::Result<Loaded> {
    let loaded = up::load(&args.filenames)?;
    notes(&loaded.notes);
    Ok(loaded)
}

fn notes(notes: &[String]) {
    for note in notes {
        output::error(&format!("note: {note}"));
    }
}

/// Names every document that was not used.
fn left_out(loaded: &Loaded, refused: &[Problem]) -> u8 {
    let mut code = OK;
    for problem in loaded.problems.iter().chain(refused) {
        output::error(&format!("left out: {problem}"));
        code = FAILED;
    }
    code
}
