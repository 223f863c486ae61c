//! KIVI quantisation of complete pages.

use crate::cpu;
use crate::cuda;
use crate::device::order::Resource;
use crate::device::{Buffer, Device};
use crate::kv::host::WidePage;
use crate::kv::layout::KvShape;

/// Quantises wide pages into the packed pages `first ..` of `packed`. `list`: on a GPU, the address of the list of these
/// pages' addresses.
pub fn pack_pages(
    device: &Device,
    shape: &KvShape,
    pages: &[WidePage],
    first: usize,
    packed: &mut Buffer,
    list: Option<u64>,
) {
    let page_bytes = shape.packed_page_bytes();
    assert!(
        packed.len() >= (first + pages.len()) * page_bytes,
        "pack: room for pages {first}..{}",
        first + pages.len()
    );
    assert!(pages.iter().all(|p| p.len() == shape.wide_page_bytes()), "pack: size of the wide pages");
    let _pack = device.operation("pack", |uses| {
        uses.reads.extend(pages.iter().map(|page| Resource::DevicePage(page.id())));
        uses.writes.extend((first..first + pages.len()).map(|page| Resource::PackedPage(packed.id(), page)));
    });
    if let (Some(gpu), Some(list)) = (device.gpu(), list) {
        return cuda::pack_pages(gpu, shape, list, pages.len(), packed.address() + (first * page_bytes) as u64);
    }
    let to = &mut packed.bytes_mut()[first * page_bytes..(first + pages.len()) * page_bytes];
    cpu::pack::pack_pages(device.isa(), shape, pages, to);
}
