//! From the watches, which are asynchronous, to the thread that compiles, which is not.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use podway_kube::watch::Change;
use podway_kube::{Client, Kind, objects, watch};
use podway_model::{EndpointSlice, Rejection, Service};
use serde_json::Value;
use tokio::sync::mpsc::Receiver;
use tracing::debug;

use super::lb::{Board, LbService, ObjectName, Pool, SliceNodes};
use crate::flows::Directory;

/// Changes of one kind that may wait between watch and thread.
const BUFFER: usize = 256;
/// Pause while the thread's queue is full.
const FULL: Duration = Duration::from_millis(5);
/// How often the pools are read.
const POOLS: Duration = Duration::from_secs(30);
/// Annotation of endpoint slices: when what they tell of happened (`EndpointsLastChangeTriggerTime`).
const TRIGGER: &str = "/metadata/annotations/endpoints.kubernetes.io~1last-change-trigger-time";

/// What the thread is told.
#[derive(Debug)]
pub(super) enum Input {
    /// Services changed.
    Services(Change<Box<ServiceItem>>),
    /// EndpointSlices changed.
    Slices(Change<Box<SliceItem>>),
    /// Nodes changed.
    Nodes(Change),
    /// Ranges of load balancer addresses that are given out here.
    Pools(Vec<IpNet>),
    /// Somebody asks how things are.
    Question(super::query::Question),
    /// The agent ends.
    Stop,
}

/// A Service as it came.
#[derive(Debug)]
pub(super) struct ServiceItem {
    pub(super) name: ObjectName,
    pub(super) uid: String,
    pub(super) parsed: Result<Box<Service>, Rejection>,
    pub(super) received: Instant,
    lb: Option<Box<LbService>>,
}

impl ServiceItem {
    pub(super) fn read(value: &Value) -> Self {
        let text =
            |pointer: &str| value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        Self {
            name: (text("/metadata/namespace"), text("/metadata/name")),
            uid: text("/metadata/uid"),
            parsed: Service::parse(value).map(Box::new),
            received: Instant::now(),
            lb: LbService::read(value).map(Box::new),
        }
    }
}

/// An EndpointSlice as it came.
#[derive(Debug)]
pub(super) struct SliceItem {
    pub(super) name: ObjectName,
    pub(super) parsed: Result<Box<EndpointSlice>, Rejection>,
    pub(super) received: Instant,
    /// When what it tells of happened.
    pub(super) trigger: Option<jiff::Timestamp>,
    nodes: Option<SliceNodes>,
}

impl SliceItem {
    pub(super) fn read(value: &Value) -> Self {
        let nodes = SliceNodes::read(value);
        Self {
            name: nodes.name.clone(),
            parsed: EndpointSlice::parse(value).map(Box::new),
            received: Instant::now(),
            trigger: value.pointer(TRIGGER).and_then(Value::as_str).and_then(|t| t.parse().ok()),
            nodes: Some(nodes),
        }
    }
}

/// Starts the watches of Services and EndpointSlices, and the reading of pools. Must be called inside a runtime.
pub(super) fn start(
    client: &Client,
    flag_pool: Vec<IpNet>,
    board: &Arc<Board>,
    directory: Option<Arc<Directory>>,
    queue: &SyncSender<Input>,
) {
    let services = watch::start_parsed(client, Kind::SERVICE, BUFFER, |v| Box::new(ServiceItem::read(&v)));
    let (b, q) = (Arc::clone(board), queue.clone());
    tokio::spawn(forward(
        services,
        q,
        move |change| {
            if let Some(directory) = &directory {
                name(directory, change);
            }
            b.services(&map(change, |item| (item.name.clone(), item.lb.take().map(|lb| *lb))));
        },
        Input::Services,
    ));
    let slices = watch::start_parsed(client, Kind::ENDPOINT_SLICE, BUFFER, |v| Box::new(SliceItem::read(&v)));
    let (b, q) = (Arc::clone(board), queue.clone());
    tokio::spawn(forward(
        slices,
        q,
        move |change| {
            // Every slice has just been read with its nodes.
            let empty =
                || SliceNodes { name: ObjectName::default(), service: String::new(), nodes: Vec::new() };
            b.slices(&map(change, |item| item.nodes.take().unwrap_or_else(empty)));
        },
        Input::Slices,
    ));
    tokio::spawn(pools(client.clone(), flag_pool, queue.clone()));
}

/// Makes services known to those who show flows.
fn name(directory: &Directory, change: &Change<Box<ServiceItem>>) {
    match change {
        Change::Synced(all) => {
            directory.services(all.iter().filter_map(|item| item.parsed.as_deref().ok()));
        }
        Change::Applied(item) => {
            if let Ok(service) = &item.parsed {
                directory.service(service);
            }
        }
        Change::Deleted(item) => directory.service_gone(&item.name.0, &item.name.1),
        Change::Interrupted(_) | Change::Resumed => {}
    }
}

/// A change of something else, taken out of each object.
fn map<T, U>(change: &mut Change<T>, mut take: impl FnMut(&mut T) -> U) -> Change<U> {
    match change {
        Change::Synced(all) => Change::Synced(all.iter_mut().map(take).collect()),
        Change::Applied(one) => Change::Applied(take(one)),
        Change::Deleted(one) => Change::Deleted(take(one)),
        Change::Interrupted(why) => Change::Interrupted(why.clone()),
        Change::Resumed => Change::Resumed,
    }
}

async fn forward<T>(
    mut changes: Receiver<Change<T>>,
    queue: SyncSender<Input>,
    show: impl Fn(&mut Change<T>),
    wrap: impl Fn(Change<T>) -> Input,
) {
    while let Some(mut change) = changes.recv().await {
        show(&mut change);
        if !send(&queue, wrap(change)).await {
            return;
        }
    }
}

/// Hands over; false when nobody listens any more.
pub(super) async fn send(queue: &SyncSender<Input>, input: Input) -> bool {
    let mut input = input;
    loop {
        match queue.try_send(input) {
            Ok(()) => return true,
            Err(TrySendError::Full(back)) => {
                input = back;
                tokio::time::sleep(FULL).await;
            }
            Err(TrySendError::Disconnected(_)) => return false,
        }
    }
}

/// Every node knows which addresses are given out here: ports of them that no Service has are rejected.
async fn pools(client: Client, flags: Vec<IpNet>, queue: SyncSender<Input>) {
    let mut told: Option<Vec<IpNet>> = None;
    loop {
        let found = match objects::list(&client, Kind::LOAD_BALANCER_POOL).await {
            Ok(found) => Some(found),
            Err(error) if error.code() == Some(404) => Some(Vec::new()),
            Err(error) => {
                debug!(%error, "the pools cannot be read");
                told.is_none().then(Vec::new)
            }
        };
        if let Some(found) = found {
            let mut all = flags.clone();
            all.extend(found.iter().filter_map(|p| Pool::read(p).ok()).flat_map(|p| p.prefixes()));
            let all = IpNet::aggregate(&all);
            if told.as_ref() != Some(&all) {
                if !send(&queue, Input::Pools(all.clone())).await {
                    return;
                }
                told = Some(all);
            }
        }
        tokio::time::sleep(POOLS).await;
    }
}
