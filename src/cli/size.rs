//! Sizes in bytes as people write them.

/// Units, and bytes of each. A bare K, M, G or T is binary.
const UNITS: [(&str, u64); 14] = [
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("m", 1 << 20),
    ("g", 1 << 30),
    ("t", 1 << 40),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
];

/// Parses `4GiB`, `1.5 GB`, `512MiB`, `1000000`.
///
/// # Errors
/// A sentence that says what is allowed.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_lowercase();
    let factor = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, bytes)| *bytes);
    let bytes = match (number.parse::<u64>(), number.parse::<f64>(), factor) {
        (Ok(whole), _, Some(factor)) => whole.checked_mul(factor),
        // Exact below 2^53 bytes; a fraction of a byte is cut off.
        (_, Ok(real), Some(factor)) => Some(real * factor as f64).filter(|&b| b < u64::MAX as f64).map(|b| b as u64),
        _ => None,
    };
    bytes.ok_or_else(|| "a size is a number of bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB".into())
}

/// Bytes for people, in binary units.
pub fn show(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_shown() {
        assert_eq!(parse("4GiB"), Ok(4 << 30));
        assert_eq!(parse("512MiB"), Ok(512 << 20));
        assert_eq!(parse("1000000"), Ok(1_000_000));
        assert_eq!(parse("1.5 GB"), Ok(1_500_000_000));
        assert_eq!(parse("2g"), Ok(2 << 30));
        for bad in ["", "GiB", "-1", "1.2.3", "4 parsecs", "99999999999999999999", "99999999TiB", "1e9", "NaN"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert_eq!((show(1023), show(1536), show(3 << 30)), ("1023 B".into(), "1.5 KiB".into(), "3.0 GiB".into()));
    }
}
