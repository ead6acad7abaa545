//! Small protobuf messages at the head of a byte stream, each preceded by its length as two octets,
//! big endian. Sans-io: [`encode`] makes the bytes, [`decode`] reads a prefix of a buffer.

use prost::Message;

/// A frame that can't be read, whatever bytes follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of {length} octets is above the limit of {length_max}")]
    TooLong { length: usize, length_max: usize },
    #[error("a frame is not the expected message")]
    Malformed,
}

/// The message with its length in front.
///
/// # Panics
/// When the message is larger than 65,535 octets: callers bound every field they put in.
pub fn encode(message: &impl Message) -> Vec<u8> {
    let length = u16::try_from(message.encoded_len()).expect("fields of frames are bounded by their callers");
    let mut bytes = Vec::with_capacity(2 + usize::from(length));
    bytes.extend_from_slice(&length.to_be_bytes());
    message.encode(&mut bytes).expect("a Vec grows");
    bytes
}

/// Reads one frame from the front of `buffer`: the message and how many octets it took, or `None`
/// while octets are missing. A frame longer than `length_max` is refused before it is waited for.
pub fn decode<M: Message + Default>(buffer: &[u8], length_max: usize) -> Result<Option<(M, usize)>, FrameError> {
    let Some((head, rest)) = buffer.split_first_chunk::<2>() else { return Ok(None) };
    let length = usize::from(u16::from_be_bytes(*head));
    if length > length_max {
        return Err(FrameError::TooLong { length, length_max });
    }
    let Some(body) = rest.get(..length) else { return Ok(None) };
    let message = M::decode(body).map_err(|_| FrameError::Malformed)?;
    Ok(Some((message, 2 + length)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::opaque::Open;

    #[test]
    fn frames_are_read_only_when_whole() {
        let open = Open { port: 80, client_address: "192.0.2.1:9".into(), ..Default::default() };
        let mut bytes = encode(&open);
        bytes.extend_from_slice(b"rest");
        let whole = bytes.len() - 4;
        for cut in 0..whole {
            assert_eq!(decode::<Open>(&bytes[..cut], 512), Ok(None), "{cut}");
        }
        assert_eq!(decode::<Open>(&bytes, 512), Ok(Some((open, whole))));
    }

    #[test]
    fn an_absurd_length_is_refused_at_once() {
        let refused = FrameError::TooLong { length: 0xffff, length_max: 512 };
        assert_eq!(decode::<Open>(&[0xff, 0xff], 512), Err(refused));
    }

    #[test]
    fn garbage_is_refused() {
        assert_eq!(decode::<Open>(&[0, 3, 0xff, 0xff, 0xff], 512), Err(FrameError::Malformed));
    }
}
