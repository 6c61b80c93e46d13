//! An empty cluster's API on loopback, to try clients against:
//! `cargo run -p podway-apiserver --example serve -- 127.0.0.1:8001`, then `kubectl -s http://127.0.0.1:8001 get ns`.

use podway_apiserver::{Store, StoreConfig, serve};
use std::error::Error;
use std::net::TcpListener;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn Error>> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8001".to_owned());
    let listener = TcpListener::bind(&address)?;
    let store = Arc::new(Store::new(StoreConfig::default()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match runtime.block_on(serve(listener, store, None))? {}
}
