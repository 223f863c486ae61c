//! The kernel's notation for sets of CPUs and nodes: `0-3,8,10-12`.

/// Largest number taken for real. Linux supports 8,192 CPUs; a broken file must not make us list billions.
const MAX: usize = 1 << 16;

/// The numbers of a list, ascending and without duplicates. `None` if it is not one. A range may carry a stride
/// (`0-15:1/4`: the first of each four), as in the kernel's own parser.
pub(crate) fn parse(list: &str) -> Option<Vec<usize>> {
    let mut numbers = Vec::new();
    for part in list.trim().split(',').map(str::trim).filter(|part| !part.is_empty()) {
        extend(&mut numbers, part)?;
    }
    numbers.sort_unstable();
    numbers.dedup();
    Some(numbers)
}

fn extend(numbers: &mut Vec<usize>, part: &str) -> Option<()> {
    let (range, stride) = part.split_once(':').map_or((part, None), |(range, stride)| (range, Some(stride)));
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let (first, last) = (number(first)?, number(last)?);
    let (used, of) = match stride {
        None => (1, 1),
        Some(stride) => stride.split_once('/').and_then(|(used, of)| Some((number(used)?, number(of)?)))?,
    };
    if first > last || used == 0 || used > of {
        return None;
    }
    numbers.extend((first..=last).filter(|i| (i - first) % of < used));
    Some(())
}

fn number(digits: &str) -> Option<usize> {
    digits.trim().parse().ok().filter(|&n| n < MAX)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn lists_of_the_kernel() {
        for (list, numbers) in [
            ("", vec![]),
            ("\n", vec![]),
            ("0\n", vec![0]),
            ("0-3\n", vec![0, 1, 2, 3]),
            ("0-1,4,6-7\n", vec![0, 1, 4, 6, 7]),
            ("4, 0-1 ,1-2", vec![0, 1, 2, 4]),
            ("0-7:1/4", vec![0, 4]),
            ("0-7:2/4", vec![0, 1, 4, 5]),
        ] {
            assert_eq!(parse(list), Some(numbers), "{list:?}");
        }
    }

    #[test]
    fn what_is_no_list() {
        for broken in ["x", "3-1", "-1", "1-", "0-4294967295", "0-7:1", "0-7:0/4", "0-7:5/4", "0-7:1/0", "1 2"] {
            assert_eq!(parse(broken), None, "{broken:?}");
        }
    }
}
