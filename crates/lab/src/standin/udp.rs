//! UDP: every datagram is answered with one line of JSON.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::UdpSocket;

use super::{Answer, Phase, Protocol, Shared};

/// After an error that is not about one datagram.
const PAUSE: Duration = Duration::from_millis(10);

/// Answers until the phase is `Closed`.
pub(super) async fn serve(socket: UdpSocket, shared: Arc<Shared>) {
    let Ok(local) = socket.local_addr() else { return };
    let mut phase = shared.phase.clone();
    // The answer does not depend on what was asked, so the rest of a large datagram may be cut off.
    let mut question = [0; 64];
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut question) => received,
            _ = phase.wait_for(|p| *p == Phase::Closed) => return,
        };
        match received {
            Ok((_, peer)) => {
                let mut answer = Answer::new(&shared.identity, Protocol::Udp, local, peer);
                // A socket that is bound to no address does not know which of the pod's was used.
                if let Some(own) =
                    shared.identity.addresses.iter().find(|a| a.is_ipv4() == answer.peer_address.is_ipv4())
                {
                    answer.address = *own;
                }
                // A peer that went away is none of ours.
                let _ = socket.send_to(&answer.line(), peer).await;
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}
