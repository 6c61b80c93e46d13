//! Metrics of flows, read when they are asked for.

use std::fmt;
use std::sync::{Arc, OnceLock};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use super::Flows;
use crate::metrics::{Labels, Out};

/// Shows what there is to be shown once flows are told.
#[derive(Debug, Clone, Default)]
pub(crate) struct FlowMetrics(Arc<OnceLock<Arc<Flows>>>);

impl FlowMetrics {
    pub(crate) fn connect(&self, flows: &Arc<Flows>) {
        self.0.set(Arc::clone(flows)).ok();
    }
}

impl Collector for FlowMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(figures) = self.0.get().and_then(|flows| flows.figures()) else { return Ok(()) };
        let mut out = Out::new(&mut encoder);
        let mut rows: Vec<(Labels, u64)> = Vec::new();
        for counts in &figures.events {
            let reason = counts.reason.map_or("none", podway_abi::Reason::name);
            for (outcome, n) in [("told", counts.told), ("limited", counts.limited), ("lost", counts.lost)] {
                let labels = vec![
                    ("event", counts.kind.to_owned()),
                    ("reason", reason.to_owned()),
                    ("outcome", outcome.to_owned()),
                ];
                rows.push((labels, n));
            }
        }
        out.counter(
            "flow_events",
            "Events of flows by kind, for drops by reason, and what became of them: told, held back by limits, lost in \
             a full ring buffer",
            &rows,
        )?;
        let one = |n: usize| [(vec![], n as u64)];
        out.gauge("flow_history_entries", "Events that the history of flows holds", &one(figures.entries))?;
        out.gauge("flow_history_max_entries", "Limit of the history of flows", &one(figures.max_entries))?;
        out.gauge("flow_history_bytes", "Memory of the history of flows", &one(figures.bytes))?;
        out.gauge("flow_readers", "Connections that read flows", &one(figures.readers))?;
        let (pods, nodes, services) = figures.names;
        let rows = [("pod", pods), ("node", nodes), ("service", services)]
            .map(|(kind, n)| (vec![("kind", kind.to_owned())], n as u64));
        out.gauge("flow_names", "Objects whose names flows can have", &rows)?;
        out.counter(
            "flow_reader_missed",
            "Events that were gone from the history before a reader came to them",
            &[(vec![], figures.missed)],
        )
    }
}
