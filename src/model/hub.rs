//! `org/name`: a model in the local Hugging Face cache. Nothing is ever downloaded.
//!
//! The cache keeps a model in `models--org--name`: `refs/main` is a text that names a revision, and `snapshots/REVISION` is
//! a model folder (of links). Where the cache is, is decided as by the `huggingface_hub` library: `HF_HUB_CACHE`, else
//! `HF_HOME/hub`, else `XDG_CACHE_HOME/huggingface/hub`, else `~/.cache/huggingface/hub`.

use std::env;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The folder that `spec` means: the folder of that name, else, for `org/name`, its snapshot in the cache. What is neither
/// is given back as it is, for whoever opens it to say that it is not there.
///
/// # Errors
/// [`Error::Model`] for an `org/name` that is no folder and not in the cache: what was looked at, and how to download it.
pub fn folder(spec: &str) -> Result<PathBuf> {
    if spec.is_empty() {
        return Err(Error::Usage(
            "the model's name is empty: give a folder, org/name or synthetic:SHAPE with -m".into(),
        ));
    }
    let path = PathBuf::from(spec);
    // A name that exists but cannot be looked at is a folder's as well: opening it says why.
    if !is_repository(spec) || !matches!(path.try_exists(), Ok(false)) {
        return Ok(path);
    }
    match cache(&|name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)) {
        Some((cache, from)) => snapshot(spec, &cache, &from),
        None => Err(missing(spec, "none of HF_HUB_CACHE, HF_HOME and HOME is set, so there is no cache to look into")),
    }
}

/// `org/name`, both of letters, digits, `-`, `_` and `.`.
fn is_repository(spec: &str) -> bool {
    let part = |s: &str| {
        !s.is_empty() && !s.starts_with('.') && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    spec.split_once('/').is_some_and(|(org, name)| part(org) && part(name))
}

/// The cache, and what says so.
fn cache(variable: &dyn Fn(&str) -> Option<PathBuf>) -> Option<(PathBuf, String)> {
    let places = [
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""), // the older name
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
        ("HOME", ".cache/huggingface/hub"),
    ];
    places.into_iter().find_map(|(name, below)| {
        let value = variable(name)?;
        Some(if below.is_empty() {
            (value, format!("${name}"))
        } else {
            (value.join(below), format!("${name}/{below}"))
        })
    })
}

/// The snapshot that `refs/main` names; without one, the only snapshot.
fn snapshot(spec: &str, cache: &Path, from: &str) -> Result<PathBuf> {
    let model = cache.join(format!("models--{}", spec.replace('/', "--")));
    let looked_at = |what: &str| missing(spec, &format!("{what} {} ({from})", model.display()));
    if !model.is_dir() {
        return Err(looked_at("looked for"));
    }
    let snapshots = model.join("snapshots");
    if let Ok(revision) = std::fs::read_to_string(model.join("refs/main")) {
        let folder = snapshots.join(revision.trim());
        let is_name = !revision.trim().is_empty() && !revision.contains(['/', '\\', '\0']) && !revision.contains("..");
        return if is_name && folder.is_dir() {
            Ok(folder)
        } else {
            Err(looked_at(&format!("refs/main names the revision {:?}, which is not in", revision.trim())))
        };
    }
    let entries = std::fs::read_dir(&snapshots).into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    match (folders.pop(), folders.len()) {
        (Some(only), 0) => Ok(only),
        (Some(_), _) => Err(looked_at("no refs/main says which of several snapshots is meant in")),
        (None, _) => Err(looked_at("there is no snapshot in")),
    }
}

fn missing(spec: &str, looked: &str) -> Error {
    let fix = format!("download it with `hf download {spec}`, or give the path of a model folder");
    Error::model(spec, format!("there is no such folder, nor such a model in the Hugging Face cache: {looked}; {fix}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_repository() {
        for spec in ["meta-llama/Llama-3.2-1B", "a/b", "o_1/n.2-x"] {
            assert!(is_repository(spec), "{spec}");
        }
        for spec in ["llama", "a/b/c", "/a", "a/", "./a", "../a", "a/..", "~/a", "a/b c", "a\\b/c", "", "/", "ü/b"] {
            assert!(!is_repository(spec), "{spec}");
        }
    }

    /// The order of `huggingface_hub`.
    #[test]
    fn where_the_cache_is() {
        let found = |set: &[(&str, &str)]| {
            let variable = |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, value)| PathBuf::from(value));
            cache(&variable).map(|(path, from)| (path.display().to_string(), from))
        };
        let home = ("HOME", "/h");
        let is = |path: &str, from: &str| Some((path.to_string(), from.to_string()));
        assert_eq!(found(&[]), None);
        assert_eq!(found(&[home]), is("/h/.cache/huggingface/hub", "$HOME/.cache/huggingface/hub"));
        assert_eq!(found(&[home, ("XDG_CACHE_HOME", "/x")]).unwrap().0, "/x/huggingface/hub");
        assert_eq!(found(&[home, ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/f")]), is("/f/hub", "$HF_HOME/hub"));
        assert_eq!(found(&[home, ("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), is("/c", "$HF_HUB_CACHE"));
    }
}
