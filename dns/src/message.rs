//! What has to be known of a message to relay and cache it: its header, its question, and where its records' times to
//! live are (RFC 1035 section 4). Everything else stays octets.

/// Octets of the header.
pub const HEADER_LEN: usize = 12;
/// Octets that a client takes over UDP unless it says otherwise.
pub const UDP_LEN: usize = 512;

pub const TYPE_SOA: u16 = 6;
pub const TYPE_OPT: u16 = 41;
pub const TYPE_IXFR: u16 = 251;
pub const TYPE_AXFR: u16 = 252;

pub const FORMERR: u8 = 1;
pub const SERVFAIL: u8 = 2;
pub const NXDOMAIN: u8 = 3;
pub const NOTIMP: u8 = 4;
pub const REFUSED: u8 = 5;

const NAME_LEN_MAX: usize = 255;

/// How a message came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// Why a message can't be worked with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// Not even to be answered: too short for a header, or an answer itself.
    Ignore,
    /// A query that makes no sense.
    Answer,
}

/// A message with one question, as it came.
#[derive(Debug, Clone, Copy)]
pub struct Query<'a> {
    pub octets: &'a [u8],
    /// Where the question ends.
    question_end: usize,
    edns: Option<Edns>,
    /// Whether nothing but the question and the sender's capabilities is in it.
    plain: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Edns {
    payload: u16,
    /// Version, extended code and flags, as they came.
    ttl: u32,
    has_options: bool,
}

/// One record of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RecordAt {
    kind: u16,
    class: u16,
    ttl_at: usize,
    rdata: usize,
    end: usize,
}

fn u16_at(octets: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(octets.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(octets: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(octets.get(at..at + 4)?.try_into().ok()?))
}

/// Where the name at `at` ends.
fn skip_name(octets: &[u8], mut at: usize) -> Option<usize> {
    let begin = at;
    loop {
        let length = *octets.get(at)?;
        match length {
            0 => return Some(at + 1),
            // A pointer ends the name.
            192.. => return (at + 2 <= octets.len()).then_some(at + 2),
            64.. => return None,
            _ => at += 1 + usize::from(length),
        }
        if at - begin >= NAME_LEN_MAX {
            return None;
        }
    }
}

fn record_at(octets: &[u8], at: usize) -> Option<RecordAt> {
    let name_end = skip_name(octets, at)?;
    let rdata = name_end + 10;
    let end = rdata + usize::from(u16_at(octets, name_end + 8)?);
    (end <= octets.len()).then_some(RecordAt {
        kind: u16_at(octets, name_end)?,
        class: u16_at(octets, name_end + 2)?,
        ttl_at: name_end + 4,
        rdata,
        end,
    })
}

/// The number of records of a section: 0 questions, 1 answers, 2 authority, 3 additional.
fn count(octets: &[u8], section: usize) -> usize {
    u16_at(octets, 4 + 2 * section).map_or(0, usize::from)
}

pub fn id(octets: &[u8]) -> u16 {
    u16_at(octets, 0).unwrap_or(0)
}

fn is_response(octets: &[u8]) -> bool {
    octets[2] & 0x80 != 0
}

fn opcode(octets: &[u8]) -> u8 {
    octets[2] >> 3 & 0xf
}

pub fn rcode(octets: &[u8]) -> u8 {
    octets[3] & 0xf
}

fn is_truncated(octets: &[u8]) -> bool {
    octets[2] & 2 != 0
}

impl<'a> Query<'a> {
    pub fn read(octets: &'a [u8]) -> Result<Self, Malformed> {
        if octets.len() < HEADER_LEN || is_response(octets) {
            return Err(Malformed::Ignore);
        }
        if count(octets, 0) != 1 {
            return Err(Malformed::Answer);
        }
        let name_end = skip_name(octets, HEADER_LEN).ok_or(Malformed::Answer)?;
        // A question has nothing before it that a pointer could lead to.
        if octets[name_end - 1] != 0 || name_end + 4 > octets.len() {
            return Err(Malformed::Answer);
        }
        let question_end = name_end + 4;
        let mut query = Self { octets, question_end, edns: None, plain: opcode(octets) == 0 };
        let records: usize = (1..=3).map(|section| count(octets, section)).sum();
        let mut at = question_end;
        for _ in 0..records {
            let record = record_at(octets, at).ok_or(Malformed::Answer)?;
            at = record.end;
            if record.kind == TYPE_OPT && query.edns.is_none() {
                let ttl = u32_at(octets, record.ttl_at).unwrap_or(0);
                query.edns = Some(Edns { payload: record.class, ttl, has_options: record.end > record.rdata });
            } else {
                query.plain = false;
            }
        }
        query.plain &= at == octets.len();
        Ok(query)
    }

    pub fn id(&self) -> u16 {
        id(self.octets)
    }

    /// Whether it is a standard query, and not a notification, an update or something newer.
    pub fn is_standard(&self) -> bool {
        opcode(self.octets) == 0
    }

    /// The labels of the name that is asked for, the leftmost first.
    pub fn labels(&self) -> Vec<&'a [u8]> {
        let mut labels = Vec::new();
        let mut at = HEADER_LEN;
        while let Some(length) = self.octets.get(at).map(|length| usize::from(*length)).filter(|length| *length > 0) {
            labels.push(&self.octets[at + 1..at + 1 + length]);
            at += 1 + length;
        }
        labels
    }

    pub fn kind(&self) -> u16 {
        u16_at(self.octets, self.question_end - 4).expect("the question was read")
    }

    pub fn class(&self) -> u16 {
        u16_at(self.octets, self.question_end - 2).expect("the question was read")
    }

    /// Octets that the sender takes in one answer.
    pub fn limit(&self, transport: Transport) -> usize {
        match transport {
            Transport::Tcp => usize::from(u16::MAX),
            Transport::Udp => self.edns.map_or(UDP_LEN, |edns| usize::from(edns.payload).max(UDP_LEN)),
        }
    }

    /// What tells this question from all others whose answers may differ; `None` when no other question can have the
    /// same answer. Options of EDNS (cookies, client subnets and what is to come) may change the answer in any way.
    pub fn cache_key(&self) -> Option<Box<[u8]>> {
        let foreign = |edns: Edns| edns.has_options || edns.ttl & !0x8000 != 0;
        if !self.plain || self.edns.is_some_and(foreign) {
            return None;
        }
        // Recursion desired; authentic data, checking disabled; EDNS spoken, DNSSEC wanted.
        let wants_dnssec = self.edns.is_some_and(|edns| edns.ttl & 0x8000 != 0);
        let flags = [self.octets[2] & 1, self.octets[3] & 0x30, u8::from(self.edns.is_some()), u8::from(wants_dnssec)];
        let (name, rest) = self.octets[HEADER_LEN..self.question_end].split_at(self.question_end - HEADER_LEN - 4);
        Some([&flags[..], &name.to_ascii_lowercase(), rest].concat().into())
    }

    /// The question's octets.
    pub fn question(&self) -> &'a [u8] {
        &self.octets[HEADER_LEN..self.question_end]
    }

    /// Whether `response` answers this query, sent with `id`.
    pub fn is_answered_by(&self, id: u16, response: &[u8]) -> bool {
        if response.len() < HEADER_LEN
            || !is_response(response)
            || self::id(response) != id
            || opcode(response) != opcode(self.octets)
        {
            return false;
        }
        if count(response, 0) == 0 {
            // Servers that could not read the question do not repeat it; they have nothing but a code to say.
            let empty = (1..=2).all(|section| count(response, section) == 0);
            return empty && matches!(rcode(response), FORMERR | SERVFAIL | NOTIMP | REFUSED);
        }
        let question = self.question();
        let Some(repeated) = response.get(HEADER_LEN..self.question_end) else { return false };
        let (name, rest) = question.split_at(question.len() - 4);
        count(response, 0) == 1 && repeated[..name.len()].eq_ignore_ascii_case(name) && &repeated[name.len()..] == rest
    }

    /// An answer without any record.
    pub fn answer_code(&self, code: u8) -> Vec<u8> {
        let mut octets = self.octets[..self.question_end].to_vec();
        // A response that repeats opcode and recursion desired; recursion available.
        octets[2] = 0x80 | self.octets[2] & 0x79;
        octets[3] = 0x80 | self.octets[3] & 0x10 | code;
        octets[6..HEADER_LEN].fill(0);
        octets
    }
}

/// An answer to a message that could not be read, if it is to be answered at all.
pub fn answer_malformed(octets: &[u8]) -> Option<Vec<u8>> {
    let mut head = octets.get(..HEADER_LEN)?.to_vec();
    head[2] = 0x80 | octets[2] & 0x79;
    head[3] = 0x80 | FORMERR;
    head[4..].fill(0);
    Some(head)
}

pub fn set_id(octets: &mut [u8], id: u16) {
    octets[..2].copy_from_slice(&id.to_be_bytes());
}

/// How long an answer may be kept, and where its times to live are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keeping {
    pub ttl_s: u32,
    pub ttls_at: Box<[u16]>,
}

/// `None` when an answer may not be kept: it is cut short, an error, not understood, or says so itself.
pub fn keeping(response: &[u8], question_end: usize) -> Option<Keeping> {
    if is_truncated(response) || !matches!(rcode(response), 0 | NXDOMAIN) || opcode(response) != 0 {
        return None;
    }
    let (mut at, mut ttl_s, mut ttls_at) = (question_end, u32::MAX, Vec::new());
    let mut denial = None;
    for section in 1..=3 {
        for _ in 0..count(response, section) {
            let record = record_at(response, at)?;
            at = record.end;
            let ttl = u32_at(response, record.ttl_at)?;
            if record.kind == TYPE_OPT {
                // The upper bits of the code, or a version that nobody here speaks.
                if ttl & 0xffff_0000 != 0 {
                    return None;
                }
                continue;
            }
            // RFC 2181 section 8: a value with the highest bit set counts as zero.
            ttl_s = ttl_s.min(if ttl >> 31 == 1 { 0 } else { ttl });
            ttls_at.push(u16::try_from(record.ttl_at).ok()?);
            if section == 2 && record.kind == TYPE_SOA && record.end >= record.rdata + 20 {
                denial = Some(u32_at(response, record.end - 4)?);
            }
        }
    }
    if at != response.len() {
        return None;
    }
    if count(response, 1) == 0 || rcode(response) == NXDOMAIN {
        // RFC 2308 section 5: a denial without an SOA record is not kept.
        ttl_s = ttl_s.min(denial?);
    }
    (ttl_s > 0 && ttl_s != u32::MAX).then(|| Keeping { ttl_s, ttls_at: ttls_at.into() })
}

/// Takes `elapsed_s` from the times to live at these places.
pub fn count_down(octets: &mut [u8], ttls_at: &[u16], elapsed_s: u32) {
    for at in ttls_at {
        let at = usize::from(*at);
        let ttl = u32_at(octets, at).unwrap_or(0).saturating_sub(elapsed_s);
        octets[at..at + 4].copy_from_slice(&ttl.to_be_bytes());
    }
}

#[cfg(test)]
pub(crate) mod tests;
