//! The tensors of a model folder by name: `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
//!
//! Headers are checked before any number is read. Matrices stay in the mapping.

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, SafeTensorError, TensorInfo};
use serde_json::Value;

use super::fields::{Fields, read_text};
use super::weights::widen;
use super::{Dtype, Matrix};
use crate::device::map::Bytes;
use crate::error::{Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// A header starts with its length, 8 bytes.
const LENGTH_BYTES: usize = 8;

/// One mapped safetensors file.
struct Shard {
    file: PathBuf,
    bytes: Bytes,
    /// Names, types, shapes and offsets; the offsets count from `data_start`.
    header: Metadata,
    data_start: usize,
}

/// All tensors of a model folder.
pub(super) struct Tensors {
    /// The file that says which tensors there are; named where one is missing.
    listing: PathBuf,
    shards: Vec<Shard>,
    /// Tensor name to index in `shards`.
    shard_of: HashMap<String, usize>,
}

impl Tensors {
    /// Maps the safetensors files of `dir` and checks their headers.
    pub fn open(dir: &Path) -> Result<Tensors> {
        let single = dir.join(SINGLE);
        if exists(&single)? {
            return Tensors::single(single);
        }
        let index = dir.join(INDEX);
        match read_text(&index)? {
            Some(json) => Tensors::sharded(dir, index, &json),
            // As in a Hugging Face cache whose blobs are gone.
            None if let Ok(to) = single.read_link() => {
                let to = to.display();
                Err(Error::model(single, format!("is a link to {to}, which is not there; download the file again")))
            }
            None => Err(Error::model(
                dir,
                format!("has neither {SINGLE} nor {INDEX}; convert the weights to safetensors or download them"),
            )),
        }
    }

    fn single(file: PathBuf) -> Result<Tensors> {
        let shard = Shard::open(&file)?;
        let shard_of = shard.header.tensors().into_keys().map(|name| (name, 0)).collect();
        Ok(Tensors { listing: file, shards: vec![shard], shard_of })
    }

    fn sharded(dir: &Path, index: PathBuf, json: &str) -> Result<Tensors> {
        let files = shard_files(&index, json)?;
        let mut shards = Vec::with_capacity(files.len());
        let mut shard_of = HashMap::new();
        for (name, tensors) in files {
            let file = dir.join(&name);
            if !exists(&file)? {
                return Err(Error::model(&file, format!("this shard is missing, {INDEX} lists it; download it")));
            }
            shard_of.extend(tensors.into_iter().map(|tensor| (tensor, shards.len())));
            shards.push(Shard::open(&file)?);
        }
        Ok(Tensors { listing: index, shards, shard_of })
    }

    /// A matrix `[rows, cols]`, left in the mapping.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let (shard, info) = self.find(name, &[rows, cols])?;
        Ok(Matrix::new(shard.data(info), shard.dtype(name, info)?, rows, cols))
    }

    /// A vector `[len]`, widened to f32.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let (shard, info) = self.find(name, &[len])?;
        let dtype = shard.dtype(name, info)?;
        let mut out = vec![0.0; len];
        widen(dtype, &shard.data(info), &mut out);
        Ok(out)
    }

    /// The tensor's shard and header entry, if it has `shape`.
    fn find(&self, name: &str, shape: &[usize]) -> Result<(&Shard, &TensorInfo)> {
        let Some(&i) = self.shard_of.get(name) else {
            let what = format!("tensor {name} is missing; config.json asks for it with shape {shape:?}");
            return Err(Error::model(&self.listing, what));
        };
        let shard = &self.shards[i];
        let Some(info) = shard.header.info(name) else {
            return Err(Error::model(&shard.file, format!("tensor {name} is missing; {INDEX} places it in this file")));
        };
        if info.shape != shape {
            let what = format!("tensor {name} has shape {:?}; config.json asks for {shape:?}", info.shape);
            return Err(Error::model(&shard.file, what));
        }
        Ok((shard, info))
    }
}

impl Shard {
    fn open(file: &Path) -> Result<Shard> {
        if !std::fs::metadata(file).map_err(|e| Error::io(file, e))?.is_file() {
            return Err(Error::model(file, "not a regular file"));
        }
        let bytes = Bytes::file(file)?;
        let (header_bytes, header) =
            SafeTensors::read_metadata(&bytes).map_err(|e| Error::model(file, header_fault(e, bytes.len())))?;
        Ok(Shard { file: file.to_owned(), bytes, header, data_start: LENGTH_BYTES + header_bytes })
    }

    /// The header reader has checked that the offsets lie in the file and fit the shape and the number type.
    fn data(&self, info: &TensorInfo) -> Bytes {
        let (start, end) = info.data_offsets;
        self.bytes.slice(self.data_start + start..self.data_start + end)
    }

    fn dtype(&self, name: &str, info: &TensorInfo) -> Result<Dtype> {
        match info.dtype {
            safetensors::Dtype::BF16 => Ok(Dtype::Bf16),
            safetensors::Dtype::F16 => Ok(Dtype::F16),
            safetensors::Dtype::F32 => Ok(Dtype::F32),
            other => {
                let what = format!("tensor {name} has dtype {other}; supported are BF16, F16 and F32");
                Err(Error::model(&self.file, what))
            }
        }
    }
}

/// A file that cannot be looked at is not one that is missing.
fn exists(file: &Path) -> Result<bool> {
    file.try_exists().map_err(|e| Error::io(file, e))
}

/// What is wrong with a safetensors header, as a sentence about a file of `file_bytes` bytes.
fn header_fault(fault: SafeTensorError, file_bytes: usize) -> String {
    use SafeTensorError as E;
    let what = match fault {
        E::HeaderTooSmall => format!("{file_bytes} bytes are too few for a safetensors header; the file is truncated"),
        E::HeaderTooLarge => "the header length is above 100 MB; this is not a safetensors file".into(),
        E::InvalidHeaderLength => format!("the header runs beyond the end of the file ({file_bytes} bytes); truncated"),
        E::InvalidHeader(e) => format!("the header is not UTF-8 ({e}); this is not a safetensors file"),
        E::InvalidHeaderDeserialization(e) => format!("the header is not valid JSON ({e})"),
        E::InvalidOffset(name) => format!("the data offsets of tensor {name} overlap another's or leave a gap"),
        E::TensorInvalidInfo => "a tensor's data offsets do not fit its shape and dtype".into(),
        E::ValidationOverflow => "a tensor's shape is so large that its bytes overflow".into(),
        E::MetadataIncompleteBuffer => {
            format!("the tensors' data offsets do not end where the file ends ({file_bytes} bytes); truncated")
        }
        other => format!("{other}"),
    };
    format!("safetensors: {what}; download or convert the file again")
}

/// The index's `weight_map`, by shard: file name to tensor names.
fn shard_files(index: &Path, json: &str) -> Result<BTreeMap<String, Vec<String>>> {
    let top = Fields::parse(index, json)?;
    let Some(Value::Object(weight_map)) = top.get("weight_map") else {
        return Err(top.error("weight_map", "it must be an object of tensor names and shard files"));
    };
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, file) in weight_map {
        let file = file.as_str().filter(|file| is_shard_name(file)).ok_or_else(|| {
            let fix = "it must be the name of a .safetensors file inside the folder";
            Error::model(index, format!("weight_map places tensor {tensor} in {file}; {fix}"))
        })?;
        files.entry(file.to_string()).or_default().push(tensor.clone());
    }
    Ok(files)
}

/// A relative path that never leaves the folder, ending in `.safetensors`, that can be shown as it is.
fn is_shard_name(file: &str) -> bool {
    let inside = Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
    inside && file.ends_with(".safetensors") && !file.contains(|c: char| c == '\\' || c.is_control())
}
