//! One among many: leader election by a coordination.k8s.io Lease.
//!
//! Nobody's clock is compared with anybody else's: a Lease is free when it has not changed for its duration, as seen
//! from here.

use std::time::{Duration, Instant};

use podway_kube::objects::{create, read, replace};
use podway_kube::{Client, Error, Kind};
use serde_json::{Value, json};
use tracing::{debug, info};

/// Where the Lease is.
const NAMESPACE: &str = "kube-system";
/// For how long a Lease holds without being renewed.
const DURATION: Duration = Duration::from_secs(5);
/// How long after a renewal its holder acts. Shorter, so that two never act at the same time.
const ACTS_FOR: Duration = Duration::from_secs(4);
/// Between two renewals.
const RENEW: Duration = Duration::from_secs(1);

/// A candidate.
#[derive(Debug)]
pub(super) struct Elector {
    client: Client,
    name: &'static str,
    identity: String,
    /// What the Lease said, and since when it has said so.
    seen: Option<(String, Instant)>,
    renewed: Option<Instant>,
    looked: Option<Instant>,
}

impl Elector {
    pub(super) fn new(client: Client, name: &'static str, identity: &str) -> Self {
        Self { client, name, identity: identity.to_owned(), seen: None, renewed: None, looked: None }
    }

    /// Renews or takes the Lease when it is time to. Returns whether this candidate may act.
    ///
    /// The more candidates there are, the more seldom each looks.
    pub(super) async fn turn(&mut self, candidates: usize) -> bool {
        let spread = Duration::from_millis(10) * u32::try_from(candidates).unwrap_or(u32::MAX).min(3000);
        let pause = if self.leads() { RENEW } else { RENEW + spread };
        if self.looked.is_none_or(|at| at.elapsed() >= pause) {
            self.looked = Some(Instant::now());
            let led = self.leads();
            if let Err(error) = self.look().await {
                debug!(lease = self.name, %error, "the lease cannot be had now");
            }
            if self.leads() != led {
                info!(lease = self.name, leads = self.leads(), "leadership changed");
            }
        }
        self.leads()
    }

    /// Whether this candidate may act now.
    pub(super) fn leads(&self) -> bool {
        self.renewed.is_some_and(|at| at.elapsed() < ACTS_FOR)
    }

    /// Gives the Lease back, so that the next one need not wait.
    pub(super) async fn release(&mut self) {
        if self.renewed.take().is_none() {
            return;
        }
        let released = async {
            let Some(lease) = read(&self.client, Kind::LEASE, NAMESPACE, self.name).await? else {
                return Ok(());
            };
            if lease.pointer("/spec/holderIdentity").and_then(Value::as_str) == Some(&self.identity) {
                let lease = self.written(lease, "");
                replace(&self.client, Kind::LEASE, NAMESPACE, self.name, &lease).await?;
            }
            Ok::<_, Error>(())
        };
        if let Err(error) = released.await {
            debug!(lease = self.name, %error, "the lease is not given back");
        }
    }

    async fn look(&mut self) -> Result<(), Error> {
        // What is renewed holds from before the request was sent.
        let begun = Instant::now();
        let Some(lease) = read(&self.client, Kind::LEASE, NAMESPACE, self.name).await? else {
            let lease = self
                .written(json!({"metadata": {"name": self.name, "namespace": NAMESPACE}}), &self.identity);
            create(&self.client, Kind::LEASE, NAMESPACE, &lease).await?;
            self.renewed = Some(begun);
            return Ok(());
        };
        let holder = lease.pointer("/spec/holderIdentity").and_then(Value::as_str).unwrap_or_default();
        if holder != self.identity {
            self.renewed = None;
            if !holder.is_empty() && !self.expired(&lease) {
                return Ok(());
            }
        }
        let lease = self.written(lease, &self.identity);
        match replace(&self.client, Kind::LEASE, NAMESPACE, self.name, &lease).await {
            Ok(_) => self.renewed = Some(begun),
            // Somebody else was faster.
            Err(error) if error.code() == Some(409) => self.renewed = None,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Whether the Lease has said the same for as long as it holds.
    fn expired(&mut self, lease: &Value) -> bool {
        let said = lease["spec"].to_string();
        let holds = lease.pointer("/spec/leaseDurationSeconds").and_then(Value::as_u64);
        let holds = holds.map_or(DURATION, Duration::from_secs);
        match &self.seen {
            Some((before, since)) if *before == said => since.elapsed() >= holds,
            _ => {
                self.seen = Some((said, Instant::now()));
                false
            }
        }
    }

    fn written(&self, mut lease: Value, holder: &str) -> Value {
        let now = jiff::Timestamp::now();
        // MicroTime of the API: always six digits.
        let now = format!("{now:.6}");
        let before =
            lease.pointer("/spec/holderIdentity").and_then(Value::as_str).unwrap_or_default().to_owned();
        let transitions = lease.pointer("/spec/leaseTransitions").and_then(Value::as_u64);
        let same = before == holder;
        lease["apiVersion"] = json!("coordination.k8s.io/v1");
        lease["kind"] = json!("Lease");
        lease["spec"]["holderIdentity"] = json!(holder);
        lease["spec"]["leaseDurationSeconds"] = json!(DURATION.as_secs());
        lease["spec"]["renewTime"] = json!(now);
        if !same && !holder.is_empty() {
            lease["spec"]["acquireTime"] = json!(now);
            lease["spec"]["leaseTransitions"] = json!(transitions.map_or(0, |t| t + 1));
        }
        lease
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use podway_apiserver::{Store, StoreConfig};
    use podway_kube::Credentials;

    use super::*;

    async fn client(store: &Arc<Store>) -> (Client, tempfile::TempDir) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let store = Arc::clone(store);
        tokio::spawn(async move { podway_apiserver::serve(listener, store, None).await });
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: t\nclusters: [{{name: t, cluster: {{server: \"http://{address}\"}}}}]\n\
             contexts: [{{name: t, context: {{cluster: t, user: t}}}}]\nusers: [{{name: t, user: {{}}}}]\n"
        );
        std::fs::write(&path, text).unwrap();
        (Client::new(&Credentials::Kubeconfig(path)).await.unwrap(), dir)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn one_leads_until_it_lets_go_or_falls_silent() {
        let store = Arc::new(Store::new(StoreConfig::default()));
        let (client, _dir) = client(&store).await;
        let candidate = |name: &str| Elector::new(client.clone(), "test", name);
        let (mut a, mut b) = (candidate("a"), candidate("b"));
        assert!(a.turn(2).await);
        assert!(!b.turn(2).await);
        // Given back: the next look takes it.
        a.release().await;
        assert!(!a.leads());
        b.looked = None;
        assert!(b.turn(2).await);
        // Fallen silent: free after its time, and not before.
        let silent = Instant::now();
        while !a.leads() {
            a.looked = None;
            a.turn(2).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
            assert!(silent.elapsed() < DURATION * 2);
        }
        assert!(silent.elapsed() >= ACTS_FOR, "{:?}", silent.elapsed());
        assert!(!b.leads(), "two act at the same time");
        let key = podway_apiserver::ResourceKey::new("coordination.k8s.io", "leases", NAMESPACE, "test");
        let lease = store.get(&key).unwrap();
        assert_eq!(lease["spec"]["leaseTransitions"], 2, "{lease}");
        // The same one after a restart goes on at once.
        assert!(candidate("a").turn(2).await);
    }
}
