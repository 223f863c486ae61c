//! A cache full of random pairs, for benchmarks of decoding at a depth that nobody wants to prefill for.

use rayon::prelude::*;

use super::cache::{Admission, Cache};
use super::host::WidePage;
use super::layout::KvShape;
use super::options::PAGE;
use crate::cpu::Isa;
use crate::device::order::StreamId;
use crate::error::Result;
use crate::ops;

impl Cache {
    /// Fills an empty cache with `n` tokens of random K and V of about unit variance, through the pages of a prefill: what
    /// is packed, offloaded and kept is as real as after one. Returns the bytes sent to the host.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`]; nothing has changed then.
    ///
    /// # Panics
    /// If the cache is not empty.
    pub fn fill_synthetic(&mut self, n: usize, seed: u64) -> Result<u64> {
        assert_eq!(self.counters.n, 0, "only an empty cache is filled");
        let (bytes, host_pages) = self.prefill_needs(n);
        let mut admission = Admission::ask(self.device(), self.slab(), bytes, host_pages, "a cache of random pairs")?;
        self.begin_prefill(n, &mut admission)?;
        let (mut sent, device) = (0, self.device().clone());
        let page_bytes = self.shape.wide_page_bytes();
        let mut block = vec![0; PAGES_AT_ONCE.min(n.div_ceil(PAGE)) * page_bytes];
        for layer in 0..self.shape.n_layers {
            let mut pages = self.prefill_pages(layer, n);
            self.list_pages(layer, 0, &pages);
            for (i, pages) in pages.chunks_mut(PAGES_AT_ONCE).enumerate() {
                let first = i * PAGES_AT_ONCE;
                block.par_chunks_mut(page_bytes).zip(first..first + pages.len()).for_each(|(bytes, page)| {
                    let number = (layer * n.div_ceil(PAGE) + page) as u64;
                    let tokens = PAGE.min(n - page * PAGE);
                    fill_page(device.isa(), &self.shape, bytes, tokens, Random(seed ^ (number << 20)));
                });
                for (page, bytes) in pages.iter_mut().zip(block.chunks_exact(page_bytes)) {
                    match device.gpu() {
                        // Whoever still copies from it is ordered before the compute stream.
                        Some(gpu) => gpu.put(page.address(), bytes),
                        None => {
                            let page = WidePage::get_mut(page).expect("a page that is filled has one owner");
                            page.bytes_mut().copy_from_slice(bytes);
                        }
                    }
                }
            }
            sent += self.settle_prefill(layer, n, pages);
        }
        // What is freed now must not be in use.
        device.finish(device.record(StreamId::Compute));
        self.check_device()?;
        self.end_prefill(n);
        Ok(sent)
    }
}

/// Pages that are made before they are written: 16 MiB of Llama-3-8B's.
const PAGES_AT_ONCE: usize = 64;

/// Random pairs of the first `tokens` tokens of a page; zeros behind them.
fn fill_page(isa: Isa, shape: &KvShape, bytes: &mut [u8], tokens: usize, mut random: Random) {
    let width = shape.n_kv_heads * shape.head_dim;
    let (mut k, mut v) = (vec![0.0; width], vec![0.0; width]);
    bytes.fill(0);
    for token in 0..tokens {
        k.iter_mut().chain(&mut v).for_each(|x| *x = random.normal());
        ops::kv::round_pairs(isa, shape, bytes, token, &k, &v);
    }
}

/// splitmix64.
struct Random(u64);

impl Random {
    /// Close to a normal number of variance 1: a sum of four uniform ones.
    fn normal(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        let sum: i32 = [0, 16, 32, 48].map(|shift| i32::from((z >> shift) as i16)).iter().sum();
        // Each has variance 2^30 / 3.
        sum as f32 * (0.75f32.sqrt() / 32768.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Device, DeviceOptions};
    use crate::kv::slab::{Slab, SlabOptions};
    use crate::kv::{KvMode, KvOptions};
    use crate::model::synthetic;

    #[test]
    fn numbers_have_unit_variance() {
        let mut random = Random(1);
        let numbers: Vec<f64> = (0..10_000).map(|_| f64::from(random.normal())).collect();
        let mean = numbers.iter().sum::<f64>() / 1e4;
        let variance = numbers.iter().map(|x| x * x).sum::<f64>() / 1e4;
        assert!(mean.abs() < 0.05 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }

    #[test]
    fn every_mode_is_where_a_prefill_would_have_left_it() {
        let device = Device::cpu(&DeviceOptions { threads: Some(1), ..Default::default() }).unwrap();
        let config = synthetic::config("tiny").unwrap();
        for mode in KvMode::ALL {
            let options = KvOptions { mode, ..KvOptions::default() };
            let shape = KvShape::new(&config, &options);
            let slab = Slab::new(SlabOptions::new(shape.wide_page_bytes(), device.host_memory())).unwrap();
            let mut cache = Cache::new(&device, &slab, shape, options, 400).unwrap();
            let before = cache.bytes();
            let sent = device.run(|| cache.fill_synthetic(300, 7)).unwrap();
            let offloaded = if mode == KvMode::Full { 0 } else { 192 };
            assert_eq!((cache.counters.n, cache.counters.no, cache.counters.nq), (300, offloaded, offloaded));
            let on_host = if mode.on_host() { (offloaded / PAGE * shape.wide_page_bytes() * 2) as u64 } else { 0 };
            assert_eq!(sent, on_host, "{mode:?}");
            assert_eq!(cache.bytes(), before, "what only the prefill needed is free again");
        }
    }
}
