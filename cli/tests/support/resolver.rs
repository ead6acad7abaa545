//! A resolver for ordinary names that is not ours: every name has the same IPv4 address and no other record.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::UdpSocket;

const TYPE_A: [u8; 2] = [0, 1];
const HEADER_LEN: usize = 12;

/// Serves over UDP for as long as the test runs; yields where.
pub async fn start(listen: SocketAddr, address: Ipv4Addr) -> SocketAddr {
    let socket = UdpSocket::bind(listen).await.unwrap();
    let bound = socket.local_addr().unwrap();
    tokio::spawn(run(socket, address));
    bound
}

pub async fn run(socket: UdpSocket, address: Ipv4Addr) {
    let mut buffer = [0; 1500];
    while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
        if let Some(answer) = answer(&buffer[..length], address) {
            let _ = socket.send_to(&answer, from).await;
        }
    }
}

fn answer(query: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    // The question ends four octets after its name; what follows it, EDNS say, is not repeated.
    let name_len = query.get(HEADER_LEN..)?.iter().position(|octet| *octet == 0)? + 1;
    let question = query.get(HEADER_LEN..HEADER_LEN + name_len + 4)?;
    let of_ipv4 = question[name_len..name_len + 2] == TYPE_A;
    let mut answer = query[..2].to_vec();
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(of_ipv4), 0, 0, 0, 0]);
    answer.extend(question);
    if of_ipv4 {
        // The name of the question, type A, class IN, 60 seconds, 4 octets.
        answer.extend([0xc0, HEADER_LEN as u8, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}
