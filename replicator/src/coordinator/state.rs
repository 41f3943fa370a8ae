//! How a partition's state and memory ids are written down: JSON that a person can read and repair.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{MemoryId, PartitionState};

/// The layout of [`encode`]; another one is refused, because it may mean something else.
#[cfg(any(feature = "etcd", test))]
const VERSION: u32 = 1;

#[cfg(any(feature = "etcd", test))]
#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    #[serde(flatten)]
    state: T,
}

/// A state as one line of JSON, which begins with its version.
#[cfg(any(feature = "etcd", test))]
pub(super) fn encode(state: &PartitionState) -> String {
    let versioned = Versioned {
        version: VERSION,
        state,
    };
    serde_json::to_string(&versioned).expect("a state has only numbers, strings and lists")
}

/// Reads what [`encode`] has written.
#[cfg(any(feature = "etcd", test))]
pub(super) fn decode(bytes: &[u8]) -> Result<PartitionState, String> {
    let Versioned { version, state } =
        serde_json::from_slice::<Versioned<PartitionState>>(bytes).map_err(|e| e.to_string())?;
    if version != VERSION {
        return Err(format!(
            "it has version {version}, this build reads {VERSION}"
        ));
    }
    check(&state)?;
    Ok(state)
}

/// What must hold for every state, whoever wrote it.
pub(super) fn check(state: &PartitionState) -> Result<(), String> {
    let leads = |node: u32| state.isr.iter().any(|member| member.node == node);
    if state.leader_epoch < 0 {
        return Err(format!("leader epoch {} is negative", state.leader_epoch));
    }
    if let Some(leader) = state.leader.filter(|&leader| !leads(leader)) {
        return Err(format!("its leader, node {leader}, is not in sync"));
    }
    match state.isr.iter().find(|m| !state.replicas.contains(&m.node)) {
        Some(member) => Err(format!("node {} is in sync and no replica", member.node)),
        None => Ok(()),
    }
}

impl Serialize for MemoryId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let hex: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        serializer.serialize_str(&hex)
    }
}

impl<'de> Deserialize<'de> for MemoryId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_hex(&text)
            .map(MemoryId)
            .ok_or_else(|| D::Error::custom("a memory id has 32 hexadecimal digits"))
    }
}

fn parse_hex(text: &str) -> Option<[u8; 16]> {
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::Member;

    fn state() -> PartitionState {
        PartitionState {
            leader: Some(2),
            leader_epoch: 7,
            isr: vec![Member {
                node: 2,
                memory_id: MemoryId([0xab; 16]),
            }],
            replicas: vec![1, 2],
        }
    }

    #[test]
    fn a_state_is_readable_and_survives() {
        let text = encode(&state());
        let hex = "ab".repeat(16);
        assert_eq!(
            text,
            format!(
                r#"{{"version":1,"leader":2,"leader_epoch":7,"isr":[{{"node":2,"memory_id":"{hex}"}}],"replicas":[1,2]}}"#
            )
        );
        assert_eq!(decode(text.as_bytes()), Ok(state()));
    }

    #[test]
    fn what_is_no_state_is_refused_with_the_cause() {
        let text = encode(&state());
        for (from, to, cause) in [
            (r#""version":1"#, r#""version":2"#, "it has version 2"),
            (r#""leader":2"#, r#""leader":1"#, "node 1, is not in sync"),
            (r#""leader_epoch":7"#, r#""leader_epoch":-7"#, "negative"),
            (r#""leader_epoch":7"#, r#""leader_epoch":3000000000"#, "i32"),
            ("[1,2]", "[1]", "node 2 is in sync and no replica"),
            ("abab", "xbab", "32 hexadecimal digits"),
            ("abab", "+aab", "32 hexadecimal digits"),
            ("}]", "]", "expected"),
        ] {
            let message = decode(text.replace(from, to).as_bytes()).unwrap_err();
            assert!(message.contains(cause), "{to}: {message}");
        }
    }
}
