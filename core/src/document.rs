//! How a document is laid out over objects of an API server, none of which becomes large, so that it changes at once or
//! not at all, and only by the hand of whoever leads.
//!
//! A document has one head. What fits is in it; of what does not, it names the parts, which are objects that are written
//! before the head and never changed. So replacing the head, in the version that was last seen of it, replaces the document.
//! Whoever begins to lead replaces every head before it relies on any: from then on the versions that an earlier leader
//! knows are gone, and nothing that it still sends counts.

use serde::{Deserialize, Serialize};

/// Octets of content in one object. They are written in base64, which takes a third more: below 256 KiB in all.
pub const OBJECT_OCTETS_MAX: usize = 160 * 1024;
/// Parts of one document.
pub const PARTS_MAX: usize = 64;

/// What the head says beside what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Head {
    /// Epoch of the leader that wrote it.
    pub fence: u64,
    /// `None` while nobody has written any content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
}

/// Which content a document has, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Content {
    /// By which leader it was written, ...
    epoch: u64,
    /// ... and which of its writes that was. No two are ever the same, whatever became of them.
    write: u64,
    octets: usize,
    /// 0: the head holds it.
    parts: usize,
}

/// Somebody else has written since: a later leader, or whoever deleted what was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("another replica has written it since")]
pub struct Overtaken;

/// A document would need more than [`PARTS_MAX`] parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it would become larger than {} MiB", PARTS_MAX * OBJECT_OCTETS_MAX / (1024 * 1024))]
pub struct TooLarge;

/// What is there is not what the head says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{found} octets where the head says {wanted}")]
pub struct Damaged {
    pub wanted: usize,
    pub found: usize,
}

/// A document as it is to be written: the parts first, if there are any, then the head.
#[derive(Debug, PartialEq, Eq)]
pub struct Layout<'a> {
    pub head: Head,
    /// What the head holds itself.
    pub inline: Option<&'a [u8]>,
    /// The other objects, by name.
    pub parts: Vec<(String, &'a [u8])>,
}

impl Head {
    /// The head of a document that nobody has written yet.
    pub fn unwritten(epoch: u64) -> Self {
        Self { fence: epoch, content: None }
    }

    /// The same document with `epoch` as the only one that may write it.
    pub fn claimed(&self, epoch: u64) -> Result<Self, Overtaken> {
        if self.fence >= epoch { Err(Overtaken) } else { Ok(Self { fence: epoch, ..self.clone() }) }
    }

    /// Judges what is found where a write of `epoch` failed or nobody knows what became of it: whether it may be tried
    /// again in the version that is there now.
    pub fn after_failure(found: Option<&Head>, epoch: u64) -> Result<(), Overtaken> {
        if found.is_some_and(|head| head.fence == epoch) { Ok(()) } else { Err(Overtaken) }
    }

    /// The names of the parts of the document called `name`.
    pub fn parts(&self, name: &str) -> Vec<String> {
        self.content.as_ref().map(|content| content.part_names(name)).unwrap_or_default()
    }

    /// Puts together what was read: what the head holds, and the parts in their order.
    pub fn assemble(&self, inline: Vec<u8>, parts: Vec<Vec<u8>>) -> Result<Option<Vec<u8>>, Damaged> {
        let Some(content) = &self.content else { return Ok(None) };
        let octets = if content.parts == 0 { inline } else { parts.concat() };
        if octets.len() == content.octets {
            Ok(Some(octets))
        } else {
            Err(Damaged { wanted: content.octets, found: octets.len() })
        }
    }
}

impl Content {
    fn part_names(&self, name: &str) -> Vec<String> {
        (0..self.parts).map(|part| format!("{name}-{}-{}-{part}", self.epoch, self.write)).collect()
    }
}

/// Lays `content` out as the document called `name`. `write` is one that was never used before in `epoch`.
pub fn layout<'a>(name: &str, epoch: u64, write: u64, content: &'a [u8]) -> Result<Layout<'a>, TooLarge> {
    let small = content.len() <= OBJECT_OCTETS_MAX;
    let chunks: Vec<&[u8]> = if small { Vec::new() } else { content.chunks(OBJECT_OCTETS_MAX).collect() };
    if chunks.len() > PARTS_MAX {
        return Err(TooLarge);
    }
    let described = Content { epoch, write, octets: content.len(), parts: chunks.len() };
    let parts = described.part_names(name).into_iter().zip(chunks).collect();
    Ok(Layout { head: Head { fence: epoch, content: Some(described) }, inline: small.then_some(content), parts })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    #[test]
    fn what_fits_is_in_the_head_and_what_does_not_in_parts_that_each_fit() {
        for (octets, parts) in
            [(0, 0), (OBJECT_OCTETS_MAX, 0), (OBJECT_OCTETS_MAX + 1, 2), (OBJECT_OCTETS_MAX * PARTS_MAX, PARTS_MAX)]
        {
            let content = vec![7; octets];
            let laid = layout("x", 3, 4, &content).unwrap();
            assert_eq!((laid.parts.len(), laid.inline.is_some()), (parts, parts == 0), "{octets}");
            assert!(laid.parts.iter().all(|(_, part)| part.len() <= OBJECT_OCTETS_MAX));
            let read = laid.parts.iter().map(|(_, part)| part.to_vec()).collect();
            let whole = laid.head.assemble(laid.inline.unwrap_or_default().to_vec(), read);
            assert_eq!(whole, Ok(Some(content.clone())));
            assert_eq!(laid.head.parts("x"), laid.parts.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>());
        }
        assert_eq!(layout("x", 3, 4, &vec![0; OBJECT_OCTETS_MAX * PARTS_MAX + 1]), Err(TooLarge));
        let head = layout("x", 3, 4, b"abc").unwrap().head;
        assert_eq!(head.assemble(b"ab".to_vec(), Vec::new()), Err(Damaged { wanted: 3, found: 2 }));
        assert_eq!(Head::unwritten(3).assemble(Vec::new(), Vec::new()), Ok(None));
    }

    #[test]
    fn only_an_earlier_epoch_is_overtaken() {
        let head = layout("x", 5, 1, b"abc").unwrap().head;
        assert_eq!((head.claimed(4), head.claimed(5)), (Err(Overtaken), Err(Overtaken)));
        let claimed = head.claimed(6).unwrap();
        assert_eq!((claimed.fence, &claimed.content), (6, &head.content), "the content stays whose it is");
        for (found, epoch, may) in [(Some(&head), 5, true), (Some(&claimed), 5, false), (None, 5, false)] {
            assert_eq!(Head::after_failure(found, epoch).is_ok(), may, "{found:?}");
        }
    }

    /// An API server's objects, and what each writer believes of the head.
    #[derive(Default)]
    struct Objects {
        head: Option<(Head, Vec<u8>)>,
        version: u64,
        parts: BTreeMap<String, Vec<u8>>,
    }

    impl Objects {
        fn read(&self) -> Option<Vec<u8>> {
            let (head, inline) = self.head.as_ref()?;
            let parts = head.parts("x").iter().map(|name| self.parts[name].clone()).collect();
            head.assemble(inline.clone(), parts).unwrap()
        }
    }

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Claims,
        /// Writes so many octets; `true`: it is killed before the head.
        Writes(usize, bool),
    }

    proptest! {
        /// Leaders that come one after the other, each of which may go on writing when the next one has come.
        #[test]
        fn what_is_read_is_what_the_latest_leader_wrote(steps in prop::collection::vec(
            (0usize..3, prop_oneof![
                1 => Just(Step::Claims),
                4 => (prop_oneof![0usize..9, OBJECT_OCTETS_MAX..OBJECT_OCTETS_MAX * 2], any::<bool>())
                    .prop_map(|(octets, killed)| Step::Writes(octets, killed)),
            ]), 1..25)) {
            let mut objects = Objects::default();
            // Of each writer: its epoch, and the version of the head that it knows.
            let mut writers: [Option<(u64, u64)>; 3] = [None; 3];
            let (mut epoch, mut latest, mut wanted) = (0, 0, None);
            for (number, (who, step)) in (0u64..).zip(steps) {
                match step {
                    Step::Claims => {
                        epoch += 1;
                        let (head, inline) = objects.head.take()
                            .map_or((Head::unwritten(epoch), Vec::new()), |(head, inline)| (head.claimed(epoch).unwrap(), inline));
                        objects.head = Some((head, inline));
                        objects.version += 1;
                        (writers[who], latest) = (Some((epoch, objects.version)), who);
                    }
                    Step::Writes(octets, killed) => {
                        let Some((own, known)) = writers[who] else { continue };
                        let content = vec![u8::try_from(number).unwrap(); octets];
                        let laid = layout("x", own, number, &content).unwrap();
                        for (name, part) in laid.parts {
                            prop_assert!(objects.parts.insert(name, part.to_vec()).is_none(), "a part is never changed");
                        }
                        if killed || known != objects.version {
                            prop_assert!(killed || who != latest, "the leader is never held up");
                            continue;
                        }
                        objects.head = Some((laid.head, laid.inline.unwrap_or_default().to_vec()));
                        objects.version += 1;
                        writers[who] = Some((own, objects.version));
                        wanted = Some(content);
                    }
                }
                prop_assert_eq!(objects.read(), wanted.clone());
            }
        }
    }
}
