//! Length-prefixed protobuf frames over a byte stream. Reads exactly the frame and nothing behind it,
//! because what follows belongs to another layer.

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt};
use tombolo_api::frame::{self, FrameError};

/// Why no frame could be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameReadError {
    #[error("the connection ended in the middle of a frame: {0}")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
}

pub(crate) async fn read<M: Message + Default>(
    io: &mut (impl AsyncRead + Unpin),
    length_max: usize,
) -> Result<M, FrameReadError> {
    let mut head = [0; 2];
    io.read_exact(&mut head).await?;
    // Checks the length before its octets are waited for.
    frame::decode::<M>(&head, length_max)?;
    let mut bytes = vec![0; 2 + usize::from(u16::from_be_bytes(head))];
    bytes[..2].copy_from_slice(&head);
    io.read_exact(&mut bytes[2..]).await?;
    match frame::decode(&bytes, length_max)? {
        Some((message, _)) => Ok(message),
        None => Err(FrameError::Malformed.into()),
    }
}
