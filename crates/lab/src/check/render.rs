//! The matrix as text for a terminal. Pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::{Cell, Endpoint, Outcome, Report};

/// Most rows and columns that are shown one by one; a larger matrix is shown by node.
const SINGLE: usize = 30;
/// Failures that are listed; the JSON output has them all.
const LISTED: usize = 100;

/// The matrix, its legend, every failure with its reason, and a summary line.
#[must_use]
pub fn render(report: &Report) -> String {
    let mut out = String::new();
    if report.endpoints.len() <= SINGLE {
        single(report, &mut out);
    } else {
        by_node(report, &mut out);
    }
    let failures: Vec<&Cell> = report.cells.iter().filter(|c| !c.is_ok()).collect();
    if !failures.is_empty() {
        out.push_str("\nfailures:\n");
        for cell in failures.iter().take(LISTED) {
            failure(report, cell, &mut out);
        }
        if failures.len() > LISTED {
            let _ = writeln!(out, "  … and {} more; -o json lists all", failures.len() - LISTED);
        }
    }
    for pod in &report.left_out {
        let _ = writeln!(out, "left out: {pod}");
    }
    for pod in &report.ending {
        let _ = writeln!(out, "not part of it: {pod} is being deleted");
    }
    let good = report.cells.len() - failures.len();
    let (pods, nodes) = (
        report.endpoints.iter().filter(|e| !e.is_node).count(),
        report.endpoints.iter().filter(|e| e.is_node).count(),
    );
    services(report, &mut out);
    let _ = writeln!(
        out,
        "\n{good} of {} paths between {pods} pods and {nodes} nodes are good (ICMP, TCP, source address), in {:.1} s",
        report.cells.len(),
        Seconds(report.millis).value()
    );
    out
}

/// What is wrong with Services, and how many ways there are.
fn services(report: &Report, out: &mut String) {
    if report.services.is_empty() {
        return;
    }
    let bad: Vec<_> = report.services.iter().filter(|s| !s.outcome.is_ok()).collect();
    if !bad.is_empty() {
        out.push_str("\nservices that do not answer as they should:\n");
    }
    for path in bad.iter().take(LISTED) {
        let cause = match &path.outcome {
            Outcome::Failed { cause } => cause.clone(),
            Outcome::WrongSource { seen } => {
                format!("sender seen as {seen}, though externalTrafficPolicy is Local")
            }
            Outcome::Ok { .. } => continue,
        };
        let _ =
            writeln!(out, "  {} -> {} ({} {}): {cause}", path.from, path.service, path.kind, path.address);
    }
    if bad.len() > LISTED {
        let _ = writeln!(out, "  … and {} more; -o json lists all", bad.len() - LISTED);
    }
    let names: std::collections::BTreeSet<&str> =
        report.services.iter().map(|s| s.service.as_str()).collect();
    let _ = writeln!(
        out,
        "\n{} of {} ways to {} services are good (cluster IPs from pods; node ports and load balancers from \
         outside)",
        report.services.len() - bad.len(),
        report.services.len(),
        names.len()
    );
}

struct Seconds(u64);

impl Seconds {
    fn value(&self) -> f64 {
        std::time::Duration::from_millis(self.0).as_secs_f64()
    }
}

/// One letter for all addresses of a pair.
fn letter(cells: &[&Cell]) -> char {
    let any = |test: fn(&Outcome) -> bool| cells.iter().any(|c| test(&c.icmp) || test(&c.tcp));
    if any(|o| matches!(o, Outcome::Failed { .. })) {
        'X'
    } else if any(|o| matches!(o, Outcome::WrongSource { .. })) {
        's'
    } else {
        '+'
    }
}

fn single(report: &Report, out: &mut String) {
    let mut pairs = BTreeMap::<(usize, usize), Vec<&Cell>>::new();
    for cell in &report.cells {
        pairs.entry((cell.from, cell.to)).or_default().push(cell);
    }
    out.push_str("from\\to");
    for to in 1..=report.endpoints.len() {
        let _ = write!(out, "{to:>3}");
    }
    out.push('\n');
    for (from, endpoint) in report.endpoints.iter().enumerate() {
        let _ = write!(out, "{:>7}", from + 1);
        for to in 0..report.endpoints.len() {
            let mark = match pairs.get(&(from, to)) {
                _ if from == to => '.',
                Some(cells) => letter(cells),
                // No family in common.
                None => '-',
            };
            let _ = write!(out, "{mark:>3}");
        }
        let _ = writeln!(out, "   {}", title(endpoint));
    }
    out.push_str("+ good   X no answer   s wrong source address   - no address family in common\n");
}

fn title(endpoint: &Endpoint) -> String {
    let addresses: Vec<String> = endpoint.addresses.iter().map(ToString::to_string).collect();
    if endpoint.is_node {
        format!("{} ({})", endpoint.name, addresses.join(" "))
    } else {
        format!("{} ({} on {})", endpoint.name, addresses.join(" "), endpoint.node)
    }
}

fn by_node(report: &Report, out: &mut String) {
    let group = |e: &Endpoint| if e.is_node { "nodes".to_owned() } else { format!("pods on {}", e.node) };
    let mut sums = BTreeMap::<(String, String), (usize, usize)>::new();
    let mut names: Vec<String> = Vec::new();
    for endpoint in &report.endpoints {
        let name = group(endpoint);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.sort_by_key(|n| (n == "nodes", n.len(), n.clone()));
    for cell in &report.cells {
        let key = (group(&report.endpoints[cell.from]), group(&report.endpoints[cell.to]));
        let sum = sums.entry(key).or_default();
        sum.0 += usize::from(cell.is_ok());
        sum.1 += 1;
    }
    let width = names.iter().map(String::len).max().unwrap_or(0).max(11);
    let _ = write!(out, "{:width$}", "from \\ to");
    for name in &names {
        let _ = write!(out, "  {name:>width$}");
    }
    out.push('\n');
    for from in &names {
        let _ = write!(out, "{from:width$}");
        for to in &names {
            let text = match sums.get(&(from.clone(), to.clone())) {
                Some((good, all)) => format!("{good}/{all}"),
                None => "-".into(),
            };
            let _ = write!(out, "  {text:>width$}");
        }
        out.push('\n');
    }
    out.push_str("good paths of all paths\n");
}

fn failure(report: &Report, cell: &Cell, out: &mut String) {
    let (from, to) = (&report.endpoints[cell.from], &report.endpoints[cell.to]);
    let mut causes = Vec::new();
    for (name, outcome) in [("ICMP", &cell.icmp), ("TCP", &cell.tcp)] {
        match outcome {
            Outcome::Ok { .. } => {}
            Outcome::Failed { cause } => causes.push(format!("{name}: {cause}")),
            Outcome::WrongSource { seen } => {
                let own: Vec<String> = from.addresses.iter().map(ToString::to_string).collect();
                causes.push(format!("{name}: sender seen as {seen} instead of {}", own.join(" or ")));
            }
        }
    }
    let place = if from.node == to.node { "same node" } else { "other node" };
    let _ = writeln!(out, "  {} -> {} {} ({place}): {}", from.name, to.name, cell.address, causes.join("; "));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(from: &str, outcome: Outcome) -> super::super::ServicePath {
        let address = "192.0.2.1:30080".parse().expect("address");
        super::super::ServicePath {
            from: from.into(),
            service: "shop/web".into(),
            kind: "NodePort",
            address,
            outcome,
        }
    }

    fn report(size: usize) -> Report {
        let address = |i: usize| format!("10.244.1.{i}").parse().expect("address");
        let endpoints = (0..size)
            .map(|i| Endpoint {
                name: if i == 0 { "node-1".into() } else { format!("shop/web-{i}") },
                is_node: i == 0,
                node: "node-1".into(),
                addresses: vec![address(i)],
                port: 80,
                answers_as: Default::default(),
                netns: String::new(),
            })
            .collect();
        let ok = Outcome::Ok { micros: 1 };
        let cells = (0..size)
            .flat_map(|from| (0..size).map(move |to| (from, to)))
            .filter(|(from, to)| from != to)
            .map(|(from, to)| Cell {
                from,
                to,
                address: address(to),
                icmp: if (from, to) == (1, 2) {
                    Outcome::Failed { cause: "silent".into() }
                } else {
                    ok.clone()
                },
                tcp: if (from, to) == (2, 1) {
                    Outcome::WrongSource { seen: address(9) }
                } else {
                    ok.clone()
                },
            })
            .collect();
        Report {
            endpoints,
            cells,
            services: vec![
                path("shop/web-1", Outcome::Ok { micros: 9 }),
                path("outside", Outcome::Failed { cause: "refused".into() }),
            ],
            left_out: vec!["shop/x: not ready: y".into()],
            ending: vec!["shop/z".into()],
            millis: 1500,
        }
    }

    #[test]
    fn small_matrices_show_every_pair_and_every_failure() {
        let text = render(&report(3));
        for line in [
            "from\\to  1  2  3",
            "      1  .  +  +   node-1 (10.244.1.0)",
            "      2  +  .  X   shop/web-1 (10.244.1.1 on node-1)",
            "      3  +  s  .   shop/web-2 (10.244.1.2 on node-1)",
            "  shop/web-1 -> shop/web-2 10.244.1.2 (same node): ICMP: silent",
            "  shop/web-2 -> shop/web-1 10.244.1.1 (same node): TCP: sender seen as 10.244.1.9 instead of 10.244.1.2",
            "left out: shop/x: not ready: y",
            "  outside -> shop/web (NodePort 192.0.2.1:30080): refused",
            "not part of it: shop/z is being deleted",
            "4 of 6 paths between 2 pods and 1 nodes are good (ICMP, TCP, source address), in 1.5 s",
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} in\n{text}");
        }
        assert!(!report(3).is_ok());
    }

    #[test]
    fn large_matrices_are_summed_up_by_node() {
        let text = render(&report(60));
        assert!(text.contains("3420/3422") && text.contains("59/59"), "{text}");
        assert!(text.lines().all(|l| l.chars().count() < 130), "{text}");
    }
}
