//! Answers for `clusterset.local`, from what somebody knows of its services.

use futures::future::BoxFuture;
use hickory_proto::op::{Edns, Message, Metadata, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tombolo_core::dns::{self, Answer, Data, Known, TTL_S, ZONE};
use tombolo_core::id::ServiceName;

use crate::message::Transport;

/// What is told over UDP at most, whatever the client takes: larger datagrams are cut into fragments, which get lost.
const UDP_LEN_MAX: usize = 1232;
/// Weight of each server in SRV records: all are equal.
const WEIGHT: u16 = 100;

/// Where services are learnt about.
pub trait Zone: Send + Sync + 'static {
    /// What is known of a service; waits a moment for the first word on it.
    fn look_up<'a>(&'a self, service: &'a ServiceName) -> BoxFuture<'a, Known>;
}

pub(crate) fn record_type(kind: u16) -> dns::RecordType {
    match RecordType::from(kind) {
        RecordType::A => dns::RecordType::A,
        RecordType::AAAA => dns::RecordType::Aaaa,
        RecordType::SRV => dns::RecordType::Srv,
        RecordType::TXT => dns::RecordType::Txt,
        RecordType::SOA => dns::RecordType::Soa,
        RecordType::ANY => dns::RecordType::Any,
        _ => dns::RecordType::Other,
    }
}

/// The answer to `query` as octets; cut short when it is longer than what the client takes, which then comes over TCP.
pub(crate) fn encode(query: &Message, answer: Answer, transport: Transport, limit: usize) -> Option<Vec<u8>> {
    let mut response = reply(query);
    response.metadata.authoritative = true;
    let question = query.queries.first()?.name();
    match answer {
        Answer::Records { answers, additional } => {
            response.add_answers(answers.into_iter().filter_map(|answer| record(question, answer)));
            response.add_additionals(additional.into_iter().filter_map(|answer| record(question, answer)));
        }
        Answer::NoData => _ = response.add_authority(soa()?),
        Answer::NxDomain => {
            response.metadata.response_code = ResponseCode::NXDomain;
            response.add_authority(soa()?);
        }
        Answer::ServFail => {
            response.metadata.authoritative = false;
            response.metadata.response_code = ResponseCode::ServFail;
        }
    }
    let limit = if transport == Transport::Udp { limit.min(UDP_LEN_MAX) } else { limit };
    let fits = |octets: &Vec<u8>| octets.len() <= limit;
    let whole = response.to_vec().ok().filter(fits);
    whole.or_else(|| {
        // Nobody needs what stands beside the answer.
        response.additionals.clear();
        response.to_vec().ok().filter(fits).or_else(|| response.truncate().to_vec().ok())
    })
}

/// A refusal of a query that could be read.
pub(crate) fn encode_code(query: &Message, code: ResponseCode) -> Option<Vec<u8>> {
    let mut response = reply(query);
    response.metadata.response_code = code;
    if let Some(edns) = &mut response.edns {
        edns.set_rcode_high(code.high());
    }
    response.to_vec().ok()
}

fn reply(query: &Message) -> Message {
    let mut response = Message::response(query.metadata.id, query.metadata.op_code);
    response.metadata = Metadata::response_from_request(&query.metadata);
    // Names of other zones are resolved here too.
    response.metadata.recursion_available = true;
    response.add_queries(query.queries.clone());
    if query.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_LEN_MAX as u16);
        response.set_edns(edns);
    }
    response
}

fn record(question: &Name, record: dns::Record) -> Option<Record> {
    let owner = match record.owner {
        Some(owner) => name(&owner)?,
        None => question.clone(),
    };
    let data = match record.data {
        Data::A(address) => RData::A(A(address)),
        Data::Aaaa(address) => RData::AAAA(AAAA(address)),
        Data::Srv { port, target } => RData::SRV(SRV::new(0, WEIGHT, port, name(&target)?)),
        Data::Txt(text) => RData::TXT(TXT::new(vec![text])),
        Data::Soa => return soa(),
    };
    Some(Record::from_rdata(owner, TTL_S, data))
}

/// Its last field is how long a denial may be kept (RFC 2308).
fn soa() -> Option<Record> {
    let (server, mailbox) = (name(&format!("ns.dns.{ZONE}"))?, name(&format!("hostmaster.{ZONE}"))?);
    let soa = SOA::new(server, mailbox, 1, 7200, 1800, 86_400, TTL_S);
    Some(Record::from_rdata(name(ZONE)?, TTL_S, RData::SOA(soa)))
}

/// `None` for a name that is too long, which a long host name in front of a long service's can be.
fn name(text: &str) -> Option<Name> {
    Name::from_ascii(format!("{text}.")).ok()
}
