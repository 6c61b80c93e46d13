//! Ending early: Ctrl-C and SIGTERM set a flag that every wait looks at, so that what was made is always removed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::signal::unix::{SignalKind, signal};

/// Between two looks at the flag.
const LOOK: Duration = Duration::from_millis(20);

/// Whether to end.
#[derive(Debug, Clone)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// A flag that only [`Stop::request`] sets.
    #[must_use]
    pub fn never() -> Self {
        Self(Arc::new(AtomicBool::new(false)))
    }

    /// A flag that SIGINT and SIGTERM set from now on, for as long as the process lives.
    ///
    /// # Errors
    /// When the signals cannot be caught.
    pub fn on_signals() -> anyhow::Result<Self> {
        let stop = Self::never();
        let seen = stop.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .context("start the thread that waits for signals")?;
        let _guard = runtime.enter();
        let mut interrupt = signal(SignalKind::interrupt()).context("catch SIGINT")?;
        let mut terminate = signal(SignalKind::terminate()).context("catch SIGTERM")?;
        drop(_guard);
        std::thread::Builder::new().name("bench-signals".into()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                seen.request();
                // The handlers stay: a second Ctrl-C must not end the removal half-way.
                std::future::pending::<()>().await;
            });
        })?;
        Ok(stop)
    }

    /// Asks to end.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether to end.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// # Errors
    /// When it was asked to end.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.is_requested() {
            bail!("interrupted");
        }
        Ok(())
    }

    /// Sleeps.
    ///
    /// # Errors
    /// When it was asked to end.
    pub fn sleep(&self, time: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            self.check()?;
            std::thread::sleep(left.min(LOOK));
        }
        Ok(())
    }

    /// Completes when it is asked to end.
    pub async fn requested(&self) {
        while !self.is_requested() {
            tokio::time::sleep(LOOK).await;
        }
    }
}
