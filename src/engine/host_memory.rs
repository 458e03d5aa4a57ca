//! How much memory this machine has left for an inference on the CPU.
//!
//! Invariant: never more than the tightest of the machine and the control group this process runs in.

use std::fs;
use std::path::Path;

/// Bytes that can be used now; `u64::MAX` where the system does not tell.
pub fn available_bytes() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_available(&text));
    let group = control_group_left(Path::new("/sys/fs/cgroup"));
    machine.into_iter().chain(group).min().unwrap_or(u64::MAX)
}

/// `MemAvailable` of /proc/meminfo, which is in KiB.
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Limit less use of the control group (version 2); none without a limit.
fn control_group_left(group: &Path) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    let (limit, used) = (read("memory.max")?, read("memory.current")?);
    // What the page cache holds is given back when it is needed.
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cache = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok()).unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(cache)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_kibibytes() {
        assert_eq!(mem_available("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(mem_available("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn a_control_group_counts_only_with_a_limit() {
        let group = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(group.path().join(name), text).unwrap();
        write("memory.current", "700\n");
        write("memory.stat", "anon 5\ninactive_file 200\n");
        write("memory.max", "max\n");
        assert_eq!(control_group_left(group.path()), None);
        write("memory.max", "1000\n");
        assert_eq!(control_group_left(group.path()), Some(500));
    }
}
