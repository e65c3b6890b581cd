//! The platforms that a device can have and a broadcast can be limited to.

use serde::{Deserialize, Serialize};

/// A device's platform, with the names of the NIM API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Platform {
    /// Apple phones and tablets.
    Ios = 1,
    /// Android.
    Aos = 2,
    /// Windows and Linux desktops.
    Pc = 4,
    /// Browsers.
    Web = 8,
    /// Apple desktops.
    Mac = 16,
}

impl Platform {
    /// Every platform, in the order in which sets are listed.
    pub const ALL: [Self; 5] = [Self::Ios, Self::Aos, Self::Pc, Self::Web, Self::Mac];

    /// Its name on the wire.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ios => "ios",
            Self::Aos => "aos",
            Self::Pc => "pc",
            Self::Web => "web",
            Self::Mac => "mac",
        }
    }

    /// The platform of this name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|platform| platform.name() == name)
    }
}

/// A set of platforms. [`Platforms::ALL`] is what a request that names none is sent to; a request's is never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Platforms(u8);

impl Platforms {
    /// All five.
    pub const ALL: Self = Self(0b1_1111);
    /// None of them: what no device here is to get.
    pub const NONE: Self = Self(0);

    /// Reads a list of names; `all` stands for every platform.
    ///
    /// # Errors
    /// A sentence, if the list is empty or holds an unknown name.
    pub fn parse<S: AsRef<str>>(names: &[S]) -> Result<Self, &'static str> {
        let mut bits = 0;
        for name in names {
            bits |= match (name.as_ref(), Platform::parse(name.as_ref())) {
                ("all", _) => Self::ALL.0,
                (_, Some(platform)) => platform as u8,
                (_, None) => return Err("targetOs may hold ios, aos, pc, web and mac"),
            };
        }
        if bits == 0 { Err("targetOs is empty: leave it out to reach every platform") } else { Ok(Self(bits)) }
    }

    /// The platforms of a list that this version knows; none at all is possible, and then no device here gets it.
    #[must_use]
    pub fn known<S: AsRef<str>>(names: &[S]) -> Self {
        let bits = names.iter().filter_map(|name| Self::parse(&[name.as_ref()]).ok());
        Self(bits.fold(0, |bits, set| bits | set.0))
    }

    /// Whether `platform` is in the set.
    #[must_use]
    pub const fn contains(self, platform: Platform) -> bool {
        self.0 & platform as u8 != 0
    }

    /// Those in both sets.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The set as bits, one a platform.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// The names in the set; `["all"]` for every platform, as the NIM API lists it.
    #[must_use]
    pub fn names(self) -> Vec<&'static str> {
        if self == Self::ALL {
            return vec!["all"];
        }
        Platform::ALL.into_iter().filter(|platform| self.contains(*platform)).map(Platform::name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_a_round_trip() {
        for names in [vec!["ios"], vec!["web", "mac"], vec!["aos", "pc", "web"], vec!["all"]] {
            assert_eq!(Platforms::parse(&names).unwrap().names(), names);
        }
    }

    #[test]
    fn what_both_hold() {
        let set = |names: &[&str]| Platforms::parse(names).unwrap();
        assert_eq!(set(&["ios", "web"]).and(set(&["web", "mac"])), set(&["web"]));
        assert_eq!(Platforms::ALL.and(Platforms::NONE), Platforms::NONE);
    }

    #[test]
    fn empty_and_unknown_are_refused() {
        assert!(Platforms::parse::<&str>(&[]).is_err());
        assert!(Platforms::parse(&["ios", "symbian"]).is_err());
    }
}
