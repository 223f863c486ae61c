//! A cache full of random pairs, for benchmarks of decoding at a depth that nobody wants to prefill for.

use super::cache::{Admission, Cache};
use super::host::WidePage;
use super::options::PAGE;
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
        let width = self.shape.n_kv_heads * self.shape.head_dim;
        let (mut k, mut v) = (vec![0.0; width], vec![0.0; width]);
        let mut bytes = vec![0; self.shape.wide_page_bytes()];
        let mut random = Random(seed);
        let (mut sent, device) = (0, self.device().clone());
        for layer in 0..self.shape.n_layers {
            let mut pages = self.prefill_pages(layer, n);
            self.list_pages(layer, 0, &pages);
            for (index, page) in pages.iter_mut().enumerate() {
                for token in 0..PAGE.min(n - index * PAGE) {
                    k.iter_mut().chain(&mut v).for_each(|x| *x = random.normal());
                    ops::kv::write_pairs(&device, &self.shape, &mut bytes, token, &k, &v);
                }
                let page = WidePage::get_mut(page).expect("a page that is filled has one owner");
                page.write(0, &bytes);
            }
            sent += self.settle_prefill(layer, n, pages);
        }
        self.check_device()?;
        self.end_prefill(n);
        Ok(sent)
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
    use crate::kv::{KvMode, KvOptions, KvShape};
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
