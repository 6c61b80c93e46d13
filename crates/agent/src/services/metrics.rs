//! Metrics of services: under Podway's names, and under kube-proxy's where they mean the same.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use podway_bpf_host::MapFill;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::kernel::Counts;
use super::lb::PoolUse;
use crate::attach::lock;
use crate::metrics::{Labels, Out};

/// From a change of an object to the kernel, in seconds: one endpoint should take milliseconds.
const PROGRAMMING: [f64; 16] =
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0];
/// One write to the kernel, in seconds.
const WRITES: [f64; 14] =
    [0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];
/// Services that are counted one by one; of more, those with the most connections.
const SERVICES_MAX: usize = 10_000;

/// Counters of one service port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PortCounts {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) port: String,
    pub(super) counts: Counts,
}

/// What is, as of the last look.
#[derive(Debug, Default)]
pub(super) struct Current {
    pub(super) mode: &'static str,
    pub(super) in_force: bool,
    /// Services, EndpointSlices.
    pub(super) objects: (usize, usize),
    /// Entries of the table by kind.
    pub(super) table: Vec<(&'static str, usize)>,
    pub(super) fill: Vec<MapFill>,
    pub(super) refused: usize,
    pub(super) findings: usize,
    pub(super) health_checks: usize,
    /// Services without a local endpoint by traffic policy.
    pub(super) no_local: [(&'static str, usize); 2],
    pub(super) ports: Vec<PortCounts>,
}

/// All metrics of services.
#[derive(Debug)]
pub struct ServiceMetrics {
    programming: Histogram,
    writes: Histogram,
    failures: Counter,
    entries: Family<Labels, Counter>,
    changes: Family<Labels, Counter>,
    network_programming: Histogram,
    sync_rules: Histogram,
    last_sync: Gauge<f64, AtomicU64>,
    last_queued: Gauge<f64, AtomicU64>,
    service_changes: Counter,
    endpoint_changes: Counter,
    current: Mutex<Current>,
    /// Written by the one that gives addresses.
    pub(super) pools: std::sync::Arc<Mutex<Vec<PoolUse>>>,
}

impl Default for ServiceMetrics {
    fn default() -> Self {
        Self {
            programming: Histogram::new(PROGRAMMING),
            writes: Histogram::new(WRITES),
            failures: Counter::default(),
            entries: Family::default(),
            changes: Family::default(),
            network_programming: Histogram::new(PROGRAMMING),
            sync_rules: Histogram::new(WRITES),
            last_sync: Gauge::default(),
            last_queued: Gauge::default(),
            service_changes: Counter::default(),
            endpoint_changes: Counter::default(),
            current: Mutex::default(),
            pools: std::sync::Arc::default(),
        }
    }
}

impl ServiceMetrics {
    /// Registers what has Podway's names.
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register(
            "service_programming_seconds",
            "From the change of a Service or an endpoint to the kernel",
            self.programming.clone(),
        );
        registry.register(
            "service_write_seconds",
            "Time that one write of services to the kernel took",
            self.writes.clone(),
        );
        registry.register(
            "service_write_failures",
            "Writes of services that the kernel refused, and that were tried again",
            self.failures.clone(),
        );
        registry.register(
            "service_entries",
            "Entries written to and removed from the kernel for services",
            self.entries.clone(),
        );
        registry.register(
            "service_object_changes",
            "Changes of objects that services are made of",
            self.changes.clone(),
        );
    }

    /// Appends what has kube-proxy's names.
    pub(crate) fn kube_proxy(&self, text: &mut String) -> fmt::Result {
        let mut registry = Registry::with_prefix("kubeproxy");
        registry.register(
            "network_programming_duration_seconds",
            "In Cluster Network Programming Latency in seconds",
            self.network_programming.clone(),
        );
        registry.register(
            "sync_proxy_rules_duration_seconds",
            "Time that one write of services to the kernel took",
            self.sync_rules.clone(),
        );
        registry.register(
            "sync_proxy_rules_last_timestamp_seconds",
            "When services were written to the kernel last",
            self.last_sync.clone(),
        );
        registry.register(
            "sync_proxy_rules_last_queued_timestamp_seconds",
            "When a change of services came last",
            self.last_queued.clone(),
        );
        registry.register(
            "sync_proxy_rules_service_changes",
            "Changes of Services",
            self.service_changes.clone(),
        );
        registry.register(
            "sync_proxy_rules_endpoint_changes",
            "Changes of EndpointSlices",
            self.endpoint_changes.clone(),
        );
        let without: Family<Labels, Gauge> = Family::default();
        for (policy, count) in lock(&self.current).no_local {
            if !policy.is_empty() {
                let labels = vec![("traffic_policy", policy.to_owned())];
                without.get_or_create(&labels).set(i64::try_from(count).unwrap_or(i64::MAX));
            }
        }
        registry.register(
            "sync_proxy_rules_no_local_endpoints_total",
            "Services with a Local traffic policy and no endpoint on this node",
            without,
        );
        prometheus_client::encoding::text::encode_registry(text, &registry)
    }

    /// Appends what is.
    pub(crate) fn show(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let now = lock(&self.current);
        if now.mode.is_empty() {
            return Ok(());
        }
        let one = |n: u64| [(vec![], n)];
        out.gauge(
            "service_mode",
            "By what mechanism services are served; 1 while its state is in force",
            &[(vec![("mode", now.mode.to_owned())], u64::from(now.in_force))],
        )?;
        let objects = [("Service", now.objects.0), ("EndpointSlice", now.objects.1)]
            .map(|(kind, n)| (vec![("kind", kind.to_owned())], n as u64));
        out.gauge("service_objects", "Objects that services are made of", &objects)?;
        let table: Vec<(Labels, u64)> =
            now.table.iter().map(|(kind, n)| (vec![("kind", (*kind).to_owned())], *n as u64)).collect();
        out.gauge("service_table_entries", "Entries of the table of services, whatever serves it", &table)?;
        let fill = |value: fn(&MapFill) -> u64| -> Vec<(Labels, u64)> {
            now.fill.iter().map(|m| (vec![("table", m.name.to_owned())], value(m))).collect()
        };
        out.gauge(
            "service_kernel_entries",
            "Entries of the kernel's tables of services",
            &fill(|m| m.entries),
        )?;
        out.gauge(
            "service_kernel_max_entries",
            "Limits of the kernel's tables of services",
            &fill(|m| m.max_entries),
        )?;
        out.gauge(
            "service_refused",
            "Parts of services that the kernel has no room for, or refuses",
            &one(now.refused as u64),
        )?;
        out.gauge(
            "service_findings",
            "What is wrong with Services and EndpointSlices",
            &one(now.findings as u64),
        )?;
        out.gauge(
            "service_health_checks",
            "Health-check node ports that are served",
            &one(now.health_checks as u64),
        )?;
        let rows = |value: fn(&Counts) -> u64| -> Vec<(Labels, u64)> {
            now.ports
                .iter()
                .map(|p| {
                    let labels = vec![
                        ("namespace", p.namespace.clone()),
                        ("service", p.name.clone()),
                        ("port", p.port.clone()),
                    ];
                    (labels, value(&p.counts))
                })
                .collect()
        };
        out.counter(
            "service_connections",
            "Connections that were given an endpoint",
            &rows(|c| c.connections),
        )?;
        out.counter("service_refusals", "Connections for which there was no endpoint", &rows(|c| c.refused))?;
        out.counter("service_packets", "Packets that were translated one by one", &rows(|c| c.packets))?;
        out.counter("service_bytes", "Bytes of packets that were translated one by one", &rows(|c| c.bytes))?;
        drop(now);
        let mut pools = Vec::new();
        for pool in lock(&self.pools).iter() {
            let size = u64::try_from(pool.size).unwrap_or(u64::MAX);
            let used = pool.used as u64;
            for (state, n) in [("used", used), ("free", size.saturating_sub(used))] {
                pools.push((vec![("pool", pool.name.clone()), ("state", state.to_owned())], n));
            }
        }
        out.gauge("load_balancer_addresses", "Addresses of pools, told by the agent that gives them", &pools)
    }

    /// An object changed.
    pub(super) fn changed(&self, kind: &'static str) {
        match kind {
            "Service" => self.service_changes.inc(),
            _ => self.endpoint_changes.inc(),
        };
        self.changes.get_or_create(&vec![("kind", kind.to_owned())]).inc();
        self.last_queued.set(unix_now());
    }

    /// A write ended well.
    pub(super) fn wrote(&self, written: usize, removed: usize, took: Duration) {
        for (what, n) in [("written", written), ("removed", removed)] {
            self.entries.get_or_create(&vec![("what", what.to_owned())]).inc_by(n as u64);
        }
        self.writes.observe(took.as_secs_f64());
        self.sync_rules.observe(took.as_secs_f64());
        self.last_sync.set(unix_now());
    }

    /// A write failed.
    pub(super) fn failed(&self) {
        self.failures.inc();
    }

    /// A change is in the kernel, so long after it came, and so long after it happened where that is known.
    pub(super) fn programmed(&self, since_received: Duration, since_trigger: Option<Duration>) {
        self.programming.observe(since_trigger.unwrap_or(since_received).as_secs_f64());
        if let Some(since) = since_trigger {
            self.network_programming.observe(since.as_secs_f64());
        }
    }

    /// Sets what is.
    pub(super) fn set_current(&self, mut current: Current) {
        if current.ports.len() > SERVICES_MAX {
            current.ports.sort_by_key(|p| std::cmp::Reverse(p.counts.connections));
            current.ports.truncate(SERVICES_MAX);
        }
        *lock(&self.current) = current;
    }
}

fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kube_proxys_names_are_there() {
        let metrics = ServiceMetrics::default();
        metrics.changed("Service");
        metrics.wrote(3, 1, Duration::from_millis(2));
        metrics.programmed(Duration::from_millis(4), Some(Duration::from_millis(40)));
        metrics.set_current(Current { no_local: [("internal", 0), ("external", 2)], ..Current::default() });
        let mut text = String::new();
        metrics.kube_proxy(&mut text).unwrap();
        for line in [
            "kubeproxy_network_programming_duration_seconds_count 1",
            "kubeproxy_sync_proxy_rules_duration_seconds_count 1",
            "kubeproxy_sync_proxy_rules_service_changes_total 1",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 0",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"external\"} 2",
        ] {
            assert!(text.contains(line), "{line} in:\n{text}");
        }
    }
}
