//! The set of all mesh addresses as a sidecar holds it: small, immutable, and enough to decide at once.
//!
//! The numbers lie in blocks of 64, each of which travels and is replaced as a whole, so that a change costs one block
//! and there is no history to replay. Ten thousand services take less than half a megabyte.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::{Number, Ranges, VirtualAddress, could_be_virtual};
use crate::id::ServiceName;

/// Numbers in one block.
pub const BLOCK_LEN: u32 = 64;

/// What one address is to the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// It is this service's, or that of one of its endpoints: carry the connection, or refuse it.
    Mesh(ServiceName),
    /// It lies in a virtual range, but is nobody's (any more): refuse it, for no network leads there.
    Unassigned,
    /// Pass it on unchanged.
    NotMesh,
    /// It may be one of the mesh's, but not all of them are known yet: wait a little, then refuse it.
    NotReadyYet,
}

/// Whose a number is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    Service,
    /// One endpoint of a headless service.
    Endpoint,
}

/// A block that makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidBlock {
    #[error("a number belongs to a service and to an endpoint")]
    Both,
    #[error("there are not as many names as numbers")]
    Names,
    #[error("a name is not namespace/name")]
    Name,
    #[error("the block lies outside the ranges")]
    Outside,
}

/// Names of the numbers of one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Bit `n`: the block's number `n` belongs to a service as a whole.
    services: u64,
    /// Bit `n`: it belongs to an endpoint of a headless service.
    endpoints: u64,
    /// `namespace/name` of every number that has one, one after the other.
    names: Box<str>,
    /// Where each of them begins and ends: a name that was there before is not there twice.
    spans: Box<[(u16, u16)]>,
}

impl Block {
    /// `names` holds one `namespace/name` for each bit set in either map, in the order of the bits.
    pub fn new(services: u64, endpoints: u64, names: &[String]) -> Result<Self, InvalidBlock> {
        if services & endpoints != 0 {
            return Err(InvalidBlock::Both);
        }
        if (services | endpoints).count_ones() as usize != names.len() {
            return Err(InvalidBlock::Names);
        }
        let mut packed = String::new();
        let mut spans: Vec<(u16, u16)> = Vec::with_capacity(names.len());
        for (n, name) in names.iter().enumerate() {
            if name.len() > 127 || !name.contains('/') || name.parse::<ServiceName>().is_err() {
                return Err(InvalidBlock::Name);
            }
            let before = names[..n].iter().position(|before| before == name);
            // 64 names of at most 127 octets.
            let offset = |at: usize| u16::try_from(at).expect("a block's names are shorter than 64 KiB");
            let span = before.map(|at| spans[at]).unwrap_or_else(|| {
                packed.push_str(name);
                (offset(packed.len() - name.len()), offset(packed.len()))
            });
            spans.push(span);
        }
        Ok(Self { services, endpoints, names: packed.into(), spans: spans.into() })
    }

    /// As [`Block::new`] takes it.
    pub fn parts(&self) -> (u64, u64, Vec<&str>) {
        (self.services, self.endpoints, self.spans.iter().map(|span| self.name(*span)).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    fn name(&self, (begin, end): (u16, u16)) -> &str {
        &self.names[begin.into()..end.into()]
    }

    fn get(&self, bit: u32) -> Option<&str> {
        let held = self.services | self.endpoints;
        let before = held & ((1_u64 << bit) - 1);
        (held >> bit & 1 == 1).then(|| self.name(self.spans[before.count_ones() as usize]))
    }

    fn holders(&self) -> impl Iterator<Item = (u32, Holder, &str)> {
        let held = self.services | self.endpoints;
        let bits = (0..BLOCK_LEN).filter(move |bit| held >> bit & 1 == 1);
        bits.zip(&self.spans).map(|(bit, span)| {
            let holder = if self.services >> bit & 1 == 1 { Holder::Service } else { Holder::Endpoint };
            (bit, holder, self.name(*span))
        })
    }
}

/// Cuts numbers and their holders into blocks.
pub fn blocks(holders: impl IntoIterator<Item = (Number, Holder, ServiceName)>) -> BTreeMap<u32, Block> {
    let mut parts: BTreeMap<u32, BTreeMap<u32, (Holder, ServiceName)>> = BTreeMap::new();
    for (number, holder, service) in holders {
        parts.entry(number.0 / BLOCK_LEN).or_default().insert(number.0 % BLOCK_LEN, (holder, service));
    }
    let block = |holders: BTreeMap<u32, (Holder, ServiceName)>| {
        let bits = |wanted: Holder| {
            let of = holders.iter().filter(|(_, (holder, _))| *holder == wanted);
            of.fold(0_u64, |bits, (bit, _)| bits | 1 << bit)
        };
        let names: Vec<_> = holders.values().map(|(_, service)| service.to_string()).collect();
        Block::new(bits(Holder::Service), bits(Holder::Endpoint), &names).expect("one holder and one name for each bit")
    };
    parts.into_iter().map(|(n, holders)| (n, block(holders))).collect()
}

/// All addresses of the mesh, as far as they were told. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct MeshAddresses {
    ranges: Option<Ranges>,
    blocks: Arc<BTreeMap<u32, Arc<Block>>>,
    complete: bool,
    /// Addresses outside the ranges that services have beside theirs: in Kubernetes the ClusterIPs of imports.
    imported: Arc<BTreeMap<IpAddr, ServiceName>>,
}

impl MeshAddresses {
    /// What an address is to the mesh, at once.
    pub fn lookup(&self, address: IpAddr) -> Lookup {
        if let Some(service) = self.imported.get(&address.to_canonical()) {
            return Lookup::Mesh(service.clone());
        }
        let Some(ranges) = &self.ranges else {
            return if could_be_virtual(address) { Lookup::NotReadyYet } else { Lookup::NotMesh };
        };
        if !ranges.contains(address) {
            return Lookup::NotMesh;
        }
        let name = ranges.number(address).and_then(|number| self.name(number));
        match name.and_then(|name| name.parse().ok()) {
            Some(service) => Lookup::Mesh(service),
            None if self.complete => Lookup::Unassigned,
            None => Lookup::NotReadyYet,
        }
    }

    /// Whether an address of this service is known, and the one of the service as a whole, which a headless one lacks.
    pub fn of_service(&self, service: &ServiceName) -> Option<Option<VirtualAddress>> {
        let name = service.to_string();
        let ranges = self.ranges?;
        let mut known = None;
        for (block, held) in &*self.blocks {
            for (bit, holder, _) in held.holders().filter(|(.., held)| *held == name) {
                match holder {
                    Holder::Service => return Some(ranges.address(Number(block * BLOCK_LEN + bit))),
                    Holder::Endpoint => known = Some(None),
                }
            }
        }
        known
    }

    /// Whether every address of the mesh is known.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    pub fn ranges(&self) -> Option<Ranges> {
        self.ranges
    }

    /// Addresses that belong to somebody, each in two families.
    pub fn len(&self) -> usize {
        self.blocks.values().map(|block| block.spans.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    pub fn has_block(&self, number: u32) -> bool {
        self.blocks.contains_key(&number)
    }

    /// The ranges were told. Others than before make everything unknown again.
    pub fn handle_ranges(&mut self, ranges: Ranges) {
        if self.ranges != Some(ranges) {
            *self = Self { ranges: Some(ranges), imported: self.imported.clone(), ..Self::default() };
        }
    }

    /// All addresses outside the ranges that are the mesh's.
    pub fn handle_imported(&mut self, imported: BTreeMap<IpAddr, ServiceName>) {
        self.imported = Arc::new(imported);
    }

    /// A block was told; an empty one holds no number any more.
    pub fn handle_block(&mut self, number: u32, block: Block) -> Result<(), InvalidBlock> {
        let count = self.ranges.as_ref().map_or(0, Ranges::count);
        if number.checked_mul(BLOCK_LEN).is_none_or(|first| first >= count) {
            return Err(InvalidBlock::Outside);
        }
        let blocks = Arc::make_mut(&mut self.blocks);
        if block.is_empty() {
            blocks.remove(&number);
        } else {
            blocks.insert(number, Arc::new(block));
        }
        Ok(())
    }

    /// Everything was told, and these are the blocks that hold numbers: absence deletes here and nowhere else.
    pub fn handle_complete(&mut self, named: &BTreeSet<u32>) {
        if self.blocks.keys().any(|block| !named.contains(block)) {
            Arc::make_mut(&mut self.blocks).retain(|block, _| named.contains(block));
        }
        // A block that was named but refused leaves its addresses unknown, not free.
        self.complete = self.ranges.is_some() && named.iter().all(|block| self.blocks.contains_key(block));
    }

    fn name(&self, number: Number) -> Option<&str> {
        self.blocks.get(&(number.0 / BLOCK_LEN))?.get(number.0 % BLOCK_LEN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn service(name: &str) -> ServiceName {
        name.parse().unwrap()
    }

    fn told(holders: Vec<(Number, Holder, ServiceName)>) -> MeshAddresses {
        let mut mesh = MeshAddresses::default();
        mesh.handle_ranges(Ranges::default());
        let blocks = blocks(holders);
        let named = blocks.keys().copied().collect();
        for (number, block) in blocks {
            mesh.handle_block(number, block).unwrap();
        }
        mesh.handle_complete(&named);
        mesh
    }

    #[track_caller]
    fn check(mesh: &MeshAddresses, address: &str, want: Lookup) {
        assert_eq!(mesh.lookup(address.parse().unwrap()), want, "{address}");
    }

    #[test]
    fn an_address_is_judged_at_every_stage() {
        let mut mesh = MeshAddresses::default();
        for (address, want) in [
            ("240.1.0.1", Lookup::NotReadyYet),
            ("240.9.0.1", Lookup::NotReadyYet),
            ("fd74:6f6d:626f::1", Lookup::NotReadyYet),
            ("10.0.0.1", Lookup::NotMesh),
            ("2001:db8::1", Lookup::NotMesh),
            ("255.255.255.255", Lookup::NotMesh),
        ] {
            check(&mesh, address, want);
        }
        mesh.handle_ranges(Ranges::default());
        check(&mesh, "240.9.0.1", Lookup::NotMesh);
        check(&mesh, "240.1.0.1", Lookup::NotReadyYet);
        let mut blocks = blocks([(Number(1), Holder::Service, service("shop/web"))]);
        mesh.handle_block(0, blocks.remove(&0).unwrap()).unwrap();
        check(&mesh, "240.1.0.1", Lookup::Mesh(service("shop/web")));
        check(&mesh, "240.1.0.2", Lookup::NotReadyYet);
        mesh.handle_complete(&[0].into());
        check(&mesh, "240.1.0.2", Lookup::Unassigned);
        check(&mesh, "240.1.0.0", Lookup::Unassigned);
        check(&mesh, "fd74:6f6d:626f::1", Lookup::Mesh(service("shop/web")));
        check(&mesh, "::ffff:240.1.0.1", Lookup::Mesh(service("shop/web")));
        // What was told stays in force while the same is told again, and other ranges begin anew.
        mesh.handle_ranges(Ranges::default());
        assert!(mesh.is_complete());
        mesh.handle_complete(&[].into());
        check(&mesh, "240.1.0.1", Lookup::Unassigned);
        mesh.handle_complete(&[7].into());
        check(&mesh, "240.1.0.1", Lookup::NotReadyYet);
        mesh.handle_ranges(Ranges { ipv4: "240.2.0.0/16".parse().unwrap(), ..Ranges::default() });
        assert!(!mesh.is_complete());
    }

    #[test]
    fn an_imported_address_is_the_services_whatever_else_is_known() {
        let mut mesh = MeshAddresses::default();
        mesh.handle_imported([("10.96.0.7".parse().unwrap(), service("shop/web"))].into());
        check(&mesh, "10.96.0.7", Lookup::Mesh(service("shop/web")));
        check(&mesh, "::ffff:10.96.0.7", Lookup::Mesh(service("shop/web")));
        check(&mesh, "10.96.0.8", Lookup::NotMesh);
        mesh.handle_ranges(Ranges::default());
        check(&mesh, "10.96.0.7", Lookup::Mesh(service("shop/web")));
        mesh.handle_imported(BTreeMap::new());
        check(&mesh, "10.96.0.7", Lookup::NotMesh);
    }

    #[test]
    fn services_are_found_by_name_too() {
        let mesh = told(vec![
            (Number(70), Holder::Service, service("shop/web")),
            (Number(71), Holder::Endpoint, service("shop/db")),
            (Number(500), Holder::Endpoint, service("shop/db")),
        ]);
        assert_eq!(mesh.len(), 3);
        let web = mesh.of_service(&service("shop/web")).unwrap().unwrap();
        assert_eq!(web.ipv4.to_string(), "240.1.0.70");
        assert_eq!(mesh.of_service(&service("shop/db")), Some(None));
        assert_eq!(mesh.of_service(&service("shop/none")), None);
    }

    #[test]
    fn blocks_that_make_no_sense_are_refused() {
        let name = || vec!["shop/web".to_owned()];
        assert_eq!(Block::new(1, 1, &name()), Err(InvalidBlock::Both));
        assert_eq!(Block::new(3, 0, &name()), Err(InvalidBlock::Names));
        assert_eq!(Block::new(0, 0, &name()), Err(InvalidBlock::Names));
        assert_eq!(Block::new(1, 0, &["web.shop".to_owned()]), Err(InvalidBlock::Name));
        assert_eq!(Block::new(1, 0, &["x".repeat(200)]), Err(InvalidBlock::Name));
        let mut mesh = MeshAddresses::default();
        let block = Block::new(1, 0, &name()).unwrap();
        assert_eq!(mesh.handle_block(0, block.clone()), Err(InvalidBlock::Outside));
        mesh.handle_ranges(Ranges::default());
        assert_eq!(mesh.handle_block(1024, block.clone()), Err(InvalidBlock::Outside));
        assert_eq!(mesh.handle_block(u32::MAX, block), Err(InvalidBlock::Outside));
    }

    proptest! {
        /// The blocks say the same as a plain map.
        #[test]
        fn blocks_hold_what_was_put_in(
            holders in proptest::collection::btree_map(1_u32..400, (any::<bool>(), 0_u8..20), 0..200),
            probes in proptest::collection::vec(1_u32..450, 20),
        ) {
            let named = |n: u8| service(&format!("ns-{}/web-{n}", n % 3));
            let kind = |endpoint| if endpoint { Holder::Endpoint } else { Holder::Service };
            let list = holders.iter().map(|(n, (endpoint, name))| (Number(*n), kind(*endpoint), named(*name)));
            let mesh = told(list.collect());
            prop_assert_eq!(mesh.len(), holders.len());
            for probe in probes {
                let want = holders.get(&probe).map_or(Lookup::Unassigned, |(_, name)| Lookup::Mesh(named(*name)));
                let address = Ranges::default().address(Number(probe)).unwrap();
                prop_assert_eq!(mesh.lookup(address.ipv4.into()), want.clone());
                prop_assert_eq!(mesh.lookup(address.ipv6.into()), want);
            }
            for block in mesh.blocks.values() {
                let (services, endpoints, names) = block.parts();
                let names: Vec<_> = names.into_iter().map(str::to_owned).collect();
                prop_assert_eq!(&Block::new(services, endpoints, &names).unwrap(), &**block);
            }
        }
    }
}
