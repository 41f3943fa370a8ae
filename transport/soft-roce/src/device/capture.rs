//! Whether, where and how much of a device's packets is recorded.

use std::env;
use std::path::PathBuf;

use super::BindError;
use crate::link::{Link, PcapLink, UdpLink, pcap_path_for};

/// Environment variable that names the file.
const FILE_VARIABLE: &str = "FARLOG_PCAP";
/// Environment variable that bounds it.
pub(super) const SIZE_VARIABLE: &str = "FARLOG_PCAP_SIZE";

/// The link to run on: the socket, with a capture around it if one is wanted.
pub(super) fn captured(
    udp: UdpLink,
    pcap: Option<PathBuf>,
    len_max: Option<u64>,
) -> Result<Box<dyn Link>, BindError> {
    let wanted = pcap.or_else(|| env::var_os(FILE_VARIABLE).map(PathBuf::from));
    let Some(path) = wanted else {
        return Ok(Box::new(udp));
    };
    let len_max = match (len_max, env::var_os(SIZE_VARIABLE)) {
        (Some(len_max), _) => len_max,
        (None, None) => u64::MAX,
        (None, Some(value)) => {
            let value = value.to_string_lossy().into_owned();
            size_from(&value).ok_or(BindError::BadPcapSize { value })?
        }
    };
    let path = pcap_path_for(&path, udp.local_addr());
    match PcapLink::create(udp, &path, len_max) {
        Ok(link) => Ok(Box::new(link)),
        Err(source) => Err(BindError::Pcap { path, source }),
    }
}

/// A number of bytes, or of `k`, `M` or `G` (powers of 1024).
fn size_from(text: &str) -> Option<u64> {
    let (number, shift) = match text.strip_suffix(['k', 'M', 'G']) {
        Some(number) if text.ends_with('k') => (number, 10),
        Some(number) if text.ends_with('M') => (number, 20),
        Some(number) => (number, 30),
        None => (text, 0),
    };
    let number: u64 = number.parse().ok().filter(|number| *number > 0)?;
    number.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_1024() {
        assert_eq!(size_from("4096"), Some(4096));
        assert_eq!(size_from("500k"), Some(500 << 10));
        assert_eq!(size_from("100M"), Some(100 << 20));
        assert_eq!(size_from("2G"), Some(2 << 30));
        for bad in ["", "0", "k", "-1", "1.5M", "1T", "99999999999G"] {
            assert_eq!(size_from(bad), None, "{bad:?}");
        }
    }
}
