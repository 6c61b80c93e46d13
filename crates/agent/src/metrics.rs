//! Prometheus metrics. What happens is counted as it happens; what is, is read when it is asked for.

use std::fmt::{self, Write as _};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use podway_bpf_host::Datapath;
use podway_link::probe::Verdict;
use podway_link::snmp;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::attach::Attacher;
use crate::events::Reporter;
use crate::flows::metrics::FlowMetrics;
use crate::services::metrics::ServiceMetrics;
use crate::status::Status;

pub(crate) type Labels = Vec<(&'static str, String)>;

/// Upper bounds for CNI operations, in seconds: the target for an ADD is 4 ms.
const CNI_BUCKETS: [f64; 10] = [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.25, 1.0, 10.0];

/// All metrics of an agent.
#[derive(Debug)]
pub struct Metrics {
    registry: OnceLock<Registry>,
    cni_requests: Family<Labels, Counter>,
    cni_seconds: Family<Labels, Histogram>,
    objects_rejected: Counter,
    repairs: Family<Labels, Counter>,
    conntrack_removed: Counter,
    /// Those of flows.
    pub(crate) flows: FlowMetrics,
    /// Those of services.
    pub(crate) services: Arc<ServiceMetrics>,
}

/// Where the values that are read come from.
pub struct Sources {
    /// Attachments and leases.
    pub attacher: Arc<Attacher>,
    /// Kernel tables.
    pub datapath: Arc<Datapath>,
    /// Everything else.
    pub status: Arc<Status>,
    /// Events.
    pub reporter: Arc<Reporter>,
    /// Services.
    pub services: Arc<ServiceMetrics>,
}

impl Metrics {
    /// Metrics that are not readable before [`Self::connect`].
    #[must_use]
    pub fn new() -> Self {
        Self {
            registry: OnceLock::new(),
            cni_requests: Family::default(),
            cni_seconds: Family::new_with_constructor(|| Histogram::new(CNI_BUCKETS)),
            objects_rejected: Counter::default(),
            repairs: Family::default(),
            conntrack_removed: Counter::default(),
            flows: FlowMetrics::default(),
            services: Arc::default(),
        }
    }

    /// Sets where the values that are read come from.
    pub fn connect(&self, sources: Sources) {
        let mut registry = Registry::with_prefix("podway");
        registry.register(
            "cni_requests",
            "CNI operations by command and error code (0: none)",
            self.cni_requests.clone(),
        );
        registry.register(
            "cni_duration_seconds",
            "Time inside the agent by CNI command",
            self.cni_seconds.clone(),
        );
        registry.register(
            "objects_rejected",
            "Kubernetes objects, or parts of them, that were refused",
            self.objects_rejected.clone(),
        );
        registry.register(
            "repairs",
            "Times that somebody else had changed what is Podway's, and it was put right",
            self.repairs.clone(),
        );
        registry.register(
            "conntrack_removed",
            "Flows removed because they were over",
            self.conntrack_removed.clone(),
        );
        self.services.register(&mut registry);
        registry.register_collector(Box::new(sources));
        registry.register_collector(Box::new(self.flows.clone()));
        self.registry.set(registry).ok();
    }

    /// A CNI operation ended.
    pub fn cni(&self, command: &'static str, code: u32, took: Duration) {
        let command = ("command", command.to_owned());
        self.cni_requests.get_or_create(&vec![command.clone(), ("code", code.to_string())]).inc();
        self.cni_seconds.get_or_create(&vec![command]).observe(took.as_secs_f64());
    }

    /// Objects were refused.
    pub fn rejected(&self, count: usize) {
        self.objects_rejected.inc_by(count as u64);
    }

    /// Something that somebody else had changed was put right.
    pub fn repaired(&self, what: &'static str) {
        self.repairs.get_or_create(&vec![("what", what.to_owned())]).inc();
    }

    /// A sweep removed flows.
    pub fn conntrack_swept(&self, removed: usize) {
        self.conntrack_removed.inc_by(removed as u64);
    }

    /// The text of `/metrics` (OpenMetrics 1.0).
    ///
    /// # Errors
    /// A value cannot be written as text, which no value here can cause.
    pub fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        match self.registry.get() {
            Some(registry) => {
                prometheus_client::encoding::text::encode_registry(&mut text, registry)?;
                self.services.kube_proxy(&mut text)?;
                prometheus_client::encoding::text::encode_eof(&mut text)?;
            }
            None => text.write_str("# EOF\n")?,
        }
        Ok(text)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").finish_non_exhaustive()
    }
}

impl Collector for Sources {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut out = Out::new(&mut encoder);
        self.pods(&mut out)?;
        self.cluster(&mut out)?;
        self.paths(&mut out)?;
        self.datapath(&mut out)?;
        self.services.show(&mut out)?;
        process(&mut out)
    }
}

impl Sources {
    fn pods(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        out.gauge("pods", "Attached pods", &[(vec![], self.attacher.len() as u64)])?;
        let waiting = self.attacher.reaping() as u64;
        out.gauge(
            "links_reaping",
            "Links of detached pods that wait for their deletion",
            &[(vec![], waiting)],
        )?;
        let ports = self.attacher.host_ports() as u64;
        out.gauge("host_ports", "Ports of the node that lead to pods", &[(vec![], ports)])?;
        let (usage, behind) = self.attacher.lease_usage();
        let rows: Vec<(Labels, u64)> = usage
            .iter()
            .flat_map(|u| {
                let free = u.usable.saturating_sub(u.leased + u.resting);
                [("leased", u.leased), ("resting", u.resting), ("free", free)]
                    .map(|(state, n)| (vec![("cidr", u.cidr.to_string()), ("state", state.into())], n))
            })
            .collect();
        out.gauge("addresses", "Pod addresses of this node by podCIDR and state", &rows)?;
        out.gauge(
            "lease_journal_behind",
            "1 while the address journal cannot be written (a full disk)",
            &[(vec![], u64::from(behind))],
        )
    }

    fn cluster(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let status = self.status.snapshot();
        let one = |n: u64| [(vec![], n)];
        out.gauge("api_connected", "1 while the API server answers", &one(status.api_connected.into()))?;
        out.gauge("nodes", "Nodes of the cluster", &one(status.nodes as u64))?;
        out.gauge("peers", "Pod ranges and node addresses in the datapath", &one(status.peers as u64))?;
        out.gauge(
            "objects_rejected_now",
            "Kubernetes objects, or parts of them, that are refused at present",
            &one(status.rejected as u64),
        )?;
        let rows: Vec<(Labels, u64)> = status
            .conditions
            .iter()
            .map(|(concern, c)| (vec![("concern", (*concern).to_owned())], c.ok.into()))
            .collect();
        out.gauge("condition", "1 while a concern of the agent is as it should be", &rows)?;
        if let Some(local) = status.local {
            out.gauge("pod_mtu_bytes", "MTU of the pods", &one(local.mtu.mtu.into()))?;
            out.gauge(
                "pod_mtu_fitting_bytes",
                "MTU of the pods that fits the underlay",
                &one(local.mtu.derived.into()),
            )?;
            out.gauge("uplink_mtu_bytes", "MTU of the underlay device", &one(local.uplink.mtu.into()))?;
        }
        out.counter("events_lost", "Kubernetes events that could not be written", &one(self.reporter.lost()))
    }

    fn paths(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let (mut found, mut expected, mut narrow, mut silent) = (vec![], vec![], vec![], vec![]);
        let (mut probes, mut rtts) = (vec![], vec![]);
        for path in self.status.snapshot().paths.into_values() {
            let label = || vec![("node", path.node.clone())];
            let (is_narrow, is_silent) = match path.verdict {
                Verdict::Proven { mtu } => {
                    found.push((label(), u64::from(mtu)));
                    expected.push((label(), u64::from(mtu)));
                    (0, 0)
                }
                Verdict::Narrow { expected: want, found: have } => {
                    found.push((label(), u64::from(have)));
                    expected.push((label(), u64::from(want)));
                    (1, 0)
                }
                Verdict::Unreachable | Verdict::Refused => (0, 1),
                Verdict::Unknown => continue,
            };
            narrow.push((label(), is_narrow));
            silent.push((label(), is_silent));
            for (result, count) in [("answered", path.probes.answered), ("lost", path.probes.lost)] {
                let mut labels = label();
                labels.push(("result", result.to_owned()));
                probes.push((labels, count));
            }
            // One that is silent has no time to its answer.
            rtts.extend(path.rtt.filter(|_| is_silent == 0).map(|rtt| (label(), rtt.as_secs_f64())));
        }
        out.gauge("path_mtu_bytes", "Largest packet that is proven to reach another node", &found)?;
        out.gauge("path_mtu_expected_bytes", "Largest packet that should reach another node", &expected)?;
        out.gauge(
            "path_mtu_narrow",
            "1 while the path to another node carries less than it should",
            &narrow,
        )?;
        out.gauge("path_silent", "1 while another node does not answer path probes", &silent)?;
        out.counter(
            "path_probes",
            "Path probes to another node by result: answered within 2 s or lost",
            &probes,
        )?;
        out.gauge("path_rtt_seconds", "Smoothed time from a path probe to its answer", &rtts)
    }

    fn datapath(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        // A table that cannot be read costs its own metrics: the rest of the page is what finds out why.
        if let Ok(counters) = self.datapath.counters() {
            let labels = |c: &podway_bpf_host::Counter| {
                let verdict = if c.dropped { "dropped" } else { "passed" };
                vec![
                    ("hook", c.hook.to_owned()),
                    ("reason", c.reason.to_owned()),
                    ("verdict", verdict.to_owned()),
                ]
            };
            let packets: Vec<(Labels, u64)> = counters.iter().map(|c| (labels(c), c.packets)).collect();
            let bytes: Vec<(Labels, u64)> = counters.iter().map(|c| (labels(c), c.bytes)).collect();
            out.counter("datapath_packets", "Packets by hook and reason", &packets)?;
            out.counter("datapath_bytes", "Bytes by hook and reason", &bytes)?;
        }
        if let Ok(fill) = self.datapath.map_fill() {
            let rows = |value: fn(&podway_bpf_host::MapFill) -> u64| -> Vec<(Labels, u64)> {
                fill.iter().map(|m| (vec![("table", m.name.to_owned())], value(m))).collect()
            };
            out.gauge("table_entries", "Entries of the datapath's tables", &rows(|m| m.entries))?;
            out.gauge("table_max_entries", "Limits of the datapath's tables", &rows(|m| m.max_entries))?;
            #[expect(clippy::cast_precision_loss, reason = "tables have fewer than 2^53 entries")]
            let ratios: Vec<(Labels, f64)> = fill
                .iter()
                .filter(|m| m.max_entries > 0)
                .map(|m| (vec![("table", m.name.to_owned())], m.entries as f64 / m.max_entries as f64))
                .collect();
            out.gauge("table_pressure_ratio", "How full the datapath's tables are, 1 being full", &ratios)?;
        }
        if let Ok(counters) = snmp::Counters::read() {
            let one = |n: u64| [(vec![], n)];
            out.counter(
                "ip_fragments_created",
                "IP fragments that this node made of packets too large for a link",
                &one(counters.fragments_created()),
            )?;
            out.counter(
                "ip_fragmentation_failures",
                "Packets that this node dropped because they are too large and may not be fragmented",
                &one(counters.fragmentations_failed()),
            )?;
        }
        Ok(())
    }
}

/// Resident memory of this process.
fn process(out: &mut Out<'_, '_>) -> fmt::Result {
    let Some(bytes) = resident_bytes() else { return Ok(()) };
    out.gauge("resident_memory_bytes", "Resident memory of the agent", &[(vec![], bytes)])
}

fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

pub(crate) struct Out<'a, 'b> {
    encoder: &'a mut DescriptorEncoder<'b>,
}

impl<'a, 'b> Out<'a, 'b> {
    pub(crate) fn new(encoder: &'a mut DescriptorEncoder<'b>) -> Self {
        Self { encoder }
    }
}

impl Out<'_, '_> {
    pub(crate) fn gauge<N: EncodeGaugeValue + Copy>(
        &mut self,
        name: &str,
        help: &str,
        rows: &[(Labels, N)],
    ) -> fmt::Result {
        if rows.is_empty() {
            return Ok(());
        }
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in rows {
            let gauge = ConstGauge::new(*value);
            if labels.is_empty() {
                // The encoder ends with its metric: a row without labels is the only one.
                return gauge.encode(metric);
            }
            gauge.encode(metric.encode_family(labels)?)?;
        }
        Ok(())
    }

    pub(crate) fn counter(&mut self, name: &str, help: &str, rows: &[(Labels, u64)]) -> fmt::Result {
        if rows.is_empty() {
            return Ok(());
        }
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in rows {
            let counter = ConstCounter::new(*value);
            if labels.is_empty() {
                return counter.encode(metric);
            }
            counter.encode(metric.encode_family(labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_read() {
        assert!(resident_bytes().is_some_and(|b| b > 1 << 20));
    }

    #[test]
    fn without_sources_the_page_is_empty_and_valid() {
        assert_eq!(Metrics::new().text().unwrap(), "# EOF\n");
    }
}
