//! How many connections there may be: in all, and from one address. Each carries a permit, so that it is counted out however
//! it ends.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::http::Refusal;

/// Counts connections. Touched when one begins and when it ends only.
#[derive(Debug)]
pub struct Caps {
    most: usize,
    /// 0: any number.
    most_per_address: u32,
    open: AtomicUsize,
    /// Empty unless there is a limit; else at most an entry a connection.
    /// A std Mutex, not tokio's: never held across an await.
    by_address: Mutex<HashMap<IpAddr, u32>>,
}

/// A connection's place; free again when it is dropped.
#[derive(Debug)]
pub struct Permit {
    caps: Arc<Caps>,
    /// Boxed, and only where it is needed: there may be a million of them.
    address: Option<Box<IpAddr>>,
}

impl Caps {
    /// At most `most` connections at a time, and `most_per_address` (0: any number) from one address.
    #[must_use]
    pub fn new(most: usize, most_per_address: u32) -> Arc<Self> {
        Arc::new(Self { most, most_per_address, open: AtomicUsize::new(0), by_address: Mutex::default() })
    }

    /// Counts a connection in.
    ///
    /// # Errors
    /// What to answer if there are as many as there may be.
    pub fn admit(self: &Arc<Self>, peer: IpAddr) -> Result<Permit, Refusal> {
        if self.open.fetch_add(1, Ordering::AcqRel) >= self.most {
            self.open.fetch_sub(1, Ordering::AcqRel);
            return Err(Refusal::Busy);
        }
        let mut permit = Permit { caps: self.clone(), address: None };
        if self.most_per_address > 0 {
            let address = counted_as(peer);
            let mut by_address = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
            let count = by_address.entry(address).or_default();
            if *count >= self.most_per_address {
                // Unlocked first: dropping the permit takes the same lock.
                drop(by_address);
                return Err(Refusal::TooMany);
            }
            *count += 1;
            permit.address = Some(Box::new(address));
        }
        Ok(permit)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.caps.open.fetch_sub(1, Ordering::AcqRel);
        let Some(address) = self.address.take() else { return };
        let mut by_address = self.caps.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(mut count) = by_address.entry(*address) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// An IPv6 host usually has a whole /64 to choose from: that is one address here.
const fn counted_as(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & 0xffff_ffff_ffff_ffff_0000_0000_0000_0000))
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn places_are_given_and_given_back() {
        let caps = Caps::new(3, 2);
        let first = caps.admit(ip("10.0.0.1")).unwrap();
        let _second = caps.admit(ip("::ffff:10.0.0.1")).unwrap();
        assert_eq!(caps.admit(ip("10.0.0.1")).unwrap_err(), Refusal::TooMany);
        let _third = caps.admit(ip("10.0.0.2")).unwrap();
        assert_eq!(caps.admit(ip("10.0.0.3")).unwrap_err(), Refusal::Busy);
        drop(first);
        drop(caps.admit(ip("10.0.0.1")).unwrap());
        assert_eq!(caps.open.load(Ordering::Acquire), 2);
        drop((_second, _third));
        assert!(caps.by_address.lock().unwrap().is_empty());
        assert_eq!(caps.open.load(Ordering::Acquire), 0);
    }

    #[test]
    fn hosts_of_one_ipv6_network_are_one_address() {
        let caps = Caps::new(9, 1);
        let _first = caps.admit(ip("2001:db8:0:1::1")).unwrap();
        assert!(caps.admit(ip("2001:db8:0:1:ffff::2")).is_err());
        assert!(caps.admit(ip("2001:db8:0:2::1")).is_ok());
    }

    #[test]
    fn without_a_limit_nothing_is_remembered() {
        let caps = Caps::new(9, 0);
        let _permits: Vec<_> = (0..5).map(|_| caps.admit(ip("10.0.0.1")).unwrap()).collect();
        assert!(caps.by_address.lock().unwrap().is_empty());
        assert_eq!(size_of::<Permit>(), 16);
    }
}
