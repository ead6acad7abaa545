//! The one UDP socket of a gateway: what its connections may hold, and the keys that outlive a restart.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use quinn::congestion::{BbrConfig, CubicConfig};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt,
};
use socket2::{Domain, Protocol, Socket, Type};
use tombolo_trust::atomic;

use super::socket::SplittingSocket;
use super::udp::QuietSocket;
use super::unreachable::ErrorQueue;
use crate::config::{Congestion, LimitsConfig};

/// What a connection has before it is known who it is: one stream and this window.
const WINDOW_BEFORE_VERDICT: u32 = 8 * 1024;
/// quinn's own end of a silent connection; liveness declares death at the same time.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// Kernel buffers of the socket, as far as the system grants them.
const SOCKET_BUFFER: usize = 4 * 1024 * 1024;
/// Octets of UDP in the largest datagram that is tried: a jumbo frame of 9,000 octets, as clouds carry within and between
/// networks of one region, less the headers of IPv6 and UDP. What a path carries is found out by probes (RFC 8899), which take
/// the place of nothing that is needed.
const DATAGRAM_MAX: u16 = 9_000 - 40 - 8;
const KEYS_FILE: &str = "tunnel-keys";
const KEYS_LENGTH: usize = 40;

/// Secrets of the endpoint that a restarted gateway needs to end its old tunnels (RFC 9000 section 10.3).
pub struct EndpointKeys {
    reset: [u8; 32],
    connection_ids: u64,
}

impl EndpointKeys {
    /// Reads the keys from the state directory, or makes them on the first start.
    pub fn load_or_create(state: &Path) -> std::io::Result<Self> {
        let path = state.join(KEYS_FILE);
        let bytes = match std::fs::read(&path).map(<[u8; KEYS_LENGTH]>::try_from) {
            Ok(Ok(bytes)) => bytes,
            // A file of another length was never written here; new keys only cost the old tunnels a timeout.
            Ok(Err(_)) => create(&path)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => create(&path)?,
            Err(error) => return Err(error),
        };
        Ok(Self::from_bytes(bytes))
    }

    pub fn random() -> Self {
        Self::from_bytes(rand::random())
    }

    fn from_bytes(bytes: [u8; KEYS_LENGTH]) -> Self {
        let (reset, ids) = bytes.split_first_chunk::<32>().expect("40 octets hold 32");
        let connection_ids = u64::from_be_bytes(ids.try_into().expect("8 octets are left of 40"));
        Self { reset: *reset, connection_ids }
    }
}

fn create(path: &Path) -> std::io::Result<[u8; KEYS_LENGTH]> {
    let bytes: [u8; KEYS_LENGTH] = rand::random();
    atomic::write_private(path, &bytes)?;
    Ok(bytes)
}

/// The socket of all tunnels.
#[derive(Debug)]
pub struct TunnelSocket {
    pub endpoint: Endpoint,
    pub errors: ErrorQueue,
}

/// Opens the socket. It accepts nothing until a server configuration is set. Needs a runtime.
pub fn bind(listen: SocketAddr, keys: &EndpointKeys) -> std::io::Result<TunnelSocket> {
    let socket = Socket::new(Domain::for_address(listen), Type::DGRAM, Some(Protocol::UDP))?;
    if listen.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Smaller buffers than asked for only cost throughput.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.set_nonblocking(true)?;
    socket.bind(&listen.into())?;
    let mut config = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &keys.reset)));
    config.max_udp_payload_size(DATAGRAM_MAX).expect("QUIC allows every size from 1,200 octets on");
    let connection_ids = keys.connection_ids;
    config.cid_generator(move || Box::new(quinn_proto::HashedConnectionIdGenerator::from_key(connection_ids)));
    let errors = ErrorQueue::of(&socket)?;
    let socket = SplittingSocket::new(QuietSocket::new(socket.into())?);
    let endpoint = Endpoint::new_with_abstract_socket(config, None, Arc::new(socket), Arc::new(quinn::TokioRuntime))?;
    Ok(TunnelSocket { endpoint, errors })
}

/// What every connection starts with, whoever dialled.
pub fn transport(congestion: Congestion, limits: &LimitsConfig) -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(DATAGRAM_MAX);
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .receive_window(VarInt::from_u32(WINDOW_BEFORE_VERDICT))
        .stream_receive_window(VarInt::from_u32(limits.stream_window))
        .send_window(limits.send_window)
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(Some(IdleTimeout::try_from(IDLE_MAX).expect("a minute fits")))
        .keep_alive_interval(Some(Duration::from_secs(10)))
        .mtu_discovery_config(Some(mtu))
        .enable_segmentation_offload(true);
    match congestion {
        Congestion::Bbr => transport.congestion_controller_factory(Arc::new(BbrConfig::default())),
        Congestion::Cubic => transport.congestion_controller_factory(Arc::new(CubicConfig::default())),
    };
    Arc::new(transport)
}

/// Gives a connection what a tunnel needs, once the door has let it in. The connection's window covers
/// every stream's, so that a stalled stream holds up no other; the stall budget bounds what that can hold.
pub fn admit(connection: &quinn::Connection, limits: &LimitsConfig) {
    let window = u64::from(limits.stream_window) * (u64::from(limits.legs_per_tunnel) + 1);
    connection.set_receive_window(VarInt::try_from(window).unwrap_or(VarInt::MAX));
    connection.set_max_concurrent_bi_streams(VarInt::from_u32(limits.legs_per_tunnel.saturating_add(1)));
}

/// A TLS configuration that QUIC can't use: it lacks TLS 1.3 with AES-128-GCM.
#[derive(Debug, thiserror::Error)]
#[error("the TLS configuration can't be used for QUIC: {0}")]
pub struct UnusableTls(#[from] quinn::crypto::rustls::NoInitialCipherSuite);

pub fn server_config(
    tls: Arc<rustls::ServerConfig>,
    transport: Arc<TransportConfig>,
    limits: &LimitsConfig,
) -> Result<ServerConfig, UnusableTls> {
    let mut config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(transport);
    config.max_incoming(limits.handshakes as usize);
    config.incoming_buffer_size_total(u64::from(limits.handshakes) * 16 * 1024);
    Ok(config)
}

pub fn client_config(
    tls: Arc<rustls::ClientConfig>,
    transport: Arc<TransportConfig>,
) -> Result<ClientConfig, UnusableTls> {
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(transport);
    Ok(config)
}
