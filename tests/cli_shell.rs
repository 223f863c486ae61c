//! What makes the command at home in a shell: models by their name in the Hugging Face cache, completions, manual pages, colours,
//! and what is said while it works.

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{fixture, hub_cache};

const PROMPT: &str = "The password of kose is zesi rere bago. Recall kose";
const COMMANDS: [&str; 10] =
    ["generate", "chat", "logits", "plan", "doctor", "devices", "bench", "eval", "completions", "man"];

/// The program without settings of the environment, those of Hugging Face and of terminals among them.
fn command(args: &[&str]) -> Command {
    let mut command = common::command(args);
    let ours = |name: &str| name.starts_with("HF_") || name.contains("COLOR");
    for (name, _) in std::env::vars_os().filter(|(name, _)| ours(&name.to_string_lossy())) {
        command.env_remove(name);
    }
    command.env_remove("HUGGINGFACE_HUB_CACHE").env_remove("XDG_CACHE_HOME");
    command
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn stdout(output: &Output) -> &str {
    assert!(output.status.success(), "{output:?}");
    text(&output.stdout)
}

/// An empty folder for one test.
fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("shell-{test}"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

// org/name

#[test]
fn a_model_is_found_by_its_name() {
    let home = folder("hub");
    let hub = home.join(".cache/huggingface/hub");
    hub_cache(&hub, "facts/recall-1", &["0123abcd", "4567ef00"], Some("4567ef00"));
    let ids = home.join("ids.json");
    fs::write(&ids, "[620, 295, 623, 15, 77]").unwrap();
    let (ids, npy) = (ids.to_str().unwrap(), home.join("o.npy"));
    let at = |place: &[(&str, &Path)], args: &[&str]| {
        let mut command = command(args);
        command.envs(place.iter().copied()).output().unwrap()
    };
    let name = "facts/recall-1";
    let generate = ["generate", "-m", name, "-p", PROMPT, "-n", "4"];
    let other = folder("hub-other");
    let found = [("HOME", &*home)];
    for place in [
        &found[..],
        &[("HOME", &*other), ("HF_HOME", &home.join(".cache/huggingface"))],
        &[("HOME", &*other), ("HF_HOME", &*other), ("HF_HUB_CACHE", &*hub)],
        &[("HOME", &*other), ("XDG_CACHE_HOME", &home.join(".cache"))],
    ] {
        assert_eq!(stdout(&at(place, &generate)), " zesi rere bago.", "{place:?}");
    }
    // The name is the model's, not the revision's.
    assert!(text(&at(&found, &generate).stderr).contains("facts/recall-1, "));
    stdout(&at(&found, &["logits", "-m", name, "--tokens", ids, "--prefill", "3", "-o", npy.to_str().unwrap()]));
    assert!(stdout(&at(&found, &["plan", "-m", name])).contains("| weights"));
    assert!(
        stdout(&at(&found, &["bench", "-m", name, "-n", "1", "-r", "1", "--kv", "full", "-d", "9"])).contains("| full")
    );
    let chat = at(&found, &["chat", "-m", name]);
    assert!(chat.status.code() == Some(2) && text(&chat.stderr).contains("no chat template"), "{chat:?}");
    // A folder of that name wins.
    let mut here = command(&generate);
    fs::create_dir_all(other.join(name)).unwrap();
    let here = here.current_dir(&other).env("HOME", &home).output().unwrap();
    assert!(here.status.code() == Some(3) && text(&here.stderr).contains("config.json"), "{here:?}");
}

#[test]
fn a_name_that_is_not_found_says_where_it_was_looked_for() {
    let home = folder("hub-missing");
    let hub = home.join("hub");
    hub_cache(&hub, "a/several", &["0123", "4567"], None);
    hub_cache(&hub, "a/only", &["0123"], None);
    hub_cache(&hub, "a/gone", &["0123"], Some("4567"));
    hub_cache(&hub, "a/outside", &["0123"], Some("../../../a"));
    fs::create_dir_all(hub.join("models--a--empty")).unwrap();
    let run = |model: &str, variable: &str| {
        let mut command = command(&["generate", "-m", model, "-p", PROMPT, "-n", "4"]);
        command.env_remove("HOME").env(variable, &home).output().unwrap()
    };
    assert_eq!(stdout(&run("a/only", "HF_HOME")), " zesi rere bago.");
    let place = hub.join("models--a--none").display().to_string();
    for (model, words) in [
        ("a/none", ["looked for", &place, "($HF_HOME/hub)", "hf download a/none"]),
        ("a/several", ["several snapshots", "models--a--several", "refs/main", "hf download a/several"]),
        ("a/gone", ["refs/main", "4567", "models--a--gone", "hf download a/gone"]),
        ("a/outside", ["refs/main", "../../../a", "models--a--outside", "hf download"]),
        ("a/empty", ["no snapshot", "models--a--empty", "hf download a/empty", "folder"]),
    ] {
        let output = run(model, "HF_HOME");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
    }
    let nowhere = run("a/none", "UNRELATED");
    assert!(text(&nowhere.stderr).contains("HF_HUB_CACHE, HF_HOME and HOME"), "{nowhere:?}");
}

// Completions and manual pages.

/// What bash offers behind these words.
fn completed(words: &[&str]) -> Vec<String> {
    let script = folder(&format!("bash-{}", words.len())).join("completions");
    fs::write(&script, &command(&["completions", "bash"]).output().unwrap().stdout).unwrap();
    // As bash calls it: the words, the place of the last one, and the function that is registered for the command.
    let run = r#"source "$0"; COMP_WORDS=(specache-engine "$@"); COMP_CWORD=$#; COMP_LINE="${COMP_WORDS[*]}"; COMP_POINT=${#COMP_LINE}
        f=$(complete -p specache-engine | sed 's/.*-F \([^ ]*\).*/\1/'); last="${@: -1}"
        "$f" specache-engine "$last" "${COMP_WORDS[$((COMP_CWORD - 1))]}"; printf '%s\n' "${COMPREPLY[@]}""#;
    let output = Command::new("bash").args(["--norc", "-c", run]).arg(&script).args(words).output().unwrap();
    assert!(output.stderr.is_empty(), "{output:?}");
    stdout(&output).lines().map(str::to_string).collect()
}

#[test]
fn bash_completes_commands_options_and_values() {
    assert_eq!(completed(&["gen"]), ["generate"]);
    for name in COMMANDS {
        assert_eq!(completed(&[name]), [name]);
    }
    assert_eq!(completed(&["generate", "--kv-res"]), ["--kv-residual"]);
    assert_eq!(completed(&["generate", "--kv", "spec"]), ["specache"]);
    assert_eq!(completed(&["plan", "-m", "synthetic:tiny", "--gpu", "h2"]), ["h200"]);
}

#[test]
fn every_shell_has_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = command(&["completions", shell]).output().unwrap();
        let script = stdout(&output);
        for word in ["specache-engine", "generate", "kv-top-k", "specache"] {
            assert!(script.contains(word), "{shell}: no {word}");
        }
    }
    let output = command(&["completions", "cmd"]).output().unwrap();
    assert!(output.status.code() == Some(2) && text(&output.stderr).contains("elvish"), "{output:?}");
}

#[test]
fn every_command_has_a_manual_page() {
    let folder = folder("man").join("man1");
    stdout(&command(&["man", "-o", folder.to_str().unwrap()]).output().unwrap());
    let main = command(&["man"]).output().unwrap();
    for (page, words) in
        COMMANDS.map(|name| (format!("specache-engine-{name}.1"), vec!["SYNOPSIS", name])).into_iter().chain([
            ("specache-engine.1".into(), vec!["SYNOPSIS", "Exit codes", "chat", "specache-engine 0."]),
            ("specache-engine-generate.1".into(), vec!["kv\\-top\\-k", "SPECACHE_KV_TOP_K", "Examples"]),
            ("specache-engine-eval-needle.1".into(), vec!["SYNOPSIS", "haystack", "SPECACHE_EVAL_DEPTHS"]),
            ("specache-engine-eval-longbench.1".into(), vec!["max\\-length"]),
        ])
    {
        let text = fs::read_to_string(folder.join(&page)).unwrap();
        assert!(text.contains(".TH ") && words.iter().all(|word| text.contains(word)), "{page}, {words:?}: {text}");
    }
    assert_eq!(stdout(&main), fs::read_to_string(folder.join("specache-engine.1")).unwrap());
    let nowhere = command(&["man", "-o", "/proc/nowhere"]).output().unwrap();
    assert!(nowhere.status.code() == Some(1) && text(&nowhere.stderr).contains("/proc/nowhere"), "{nowhere:?}");
}

/// Where shells and `man` look below a prefix.
#[test]
fn install_puts_them_in_their_places() {
    let (built, prefix) = (folder("built"), folder("prefix"));
    symlink(env!("CARGO_BIN_EXE_specache-engine"), built.join("specache-engine")).unwrap();
    // The libraries are of no interest here.
    ["libspecache.so", "libspecache.a"].iter().for_each(|name| fs::write(built.join(name), "").unwrap());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/install.sh");
    stdout(&Command::new("sh").arg(script).arg(&prefix).arg("--from").arg(&built).output().unwrap());
    for (file, words) in [
        ("man/man1/specache-engine-plan.1", ".TH "),
        ("bash-completion/completions/specache-engine", "complete -F"),
        ("zsh/site-functions/_specache-engine", "#compdef specache-engine"),
        ("fish/vendor_completions.d/specache-engine.fish", "complete -c specache-engine"),
    ] {
        assert!(fs::read_to_string(prefix.join("share").join(file)).unwrap().contains(words), "{file}");
    }
}

// What is said, and how.

#[test]
fn colours_are_for_those_who_want_them() {
    let coloured = |variables: &[(&str, &str)], args: &[&str]| {
        let output = command(args).envs(variables.iter().copied()).output().unwrap();
        [output.stdout, output.stderr].concat().contains(&0x1b)
    };
    for args in [&["--help"][..], &["generate"], &["doctor"], &["plan", "-m", "synthetic:tiny"], &["--wat"]] {
        assert!(!coloured(&[], args), "{args:?}: colours in a pipe");
        assert!(!coloured(&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")], args), "{args:?}");
    }
    assert!(coloured(&[("CLICOLOR_FORCE", "1")], &["--help"]), "so that this test can fail");
}

/// `eval` finds a model by its name, with its chat template, and says what it does before it loads.
#[test]
fn eval_by_a_models_name() {
    let home = folder("eval");
    hub_cache(&home.join("hub"), "facts/recall-1", &["0123abcd"], None);
    let snapshot = home.join("hub/models--facts--recall-1/snapshots/0123abcd");
    fs::write(snapshot.join("chat_template.jinja"), "{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    let item =
        r#"{"input":"Recall kose","context":"The password of kose is zesi rere bago.","answers":["zesi"],"_id":"a"}"#;
    fs::write(home.join("triviaqa.jsonl"), item).unwrap();
    let ids: Vec<u32> = (10..210).collect();
    let (tokens, hay) = (home.join("ids.json"), fixture("recall_prompt.txt"));
    fs::write(&tokens, format!("{ids:?}")).unwrap();
    let [tokens, hay, data] = [&tokens, &hay, &home].map(|path| path.to_str().unwrap());
    let run = |args: &[&str]| {
        let mut command = command(&["eval"]);
        command.args(args).args(["-m", "facts/recall-1", "--device", "cpu"]).env("HF_HOME", &home).output().unwrap()
    };
    let commands = [
        &["ppl", "--tokens", tokens, "-c", "100"][..],
        &["kld", "--tokens", tokens, "-c", "100", "--kv", "kivi"],
        &["coverage", "--tokens", tokens, "-c", "200"],
        &["needle", "--haystack", hay, "--lengths", "200", "--depths", "50", "--kv", "full", "-n", "2", "--chat"],
        &["longbench", "--data", data, "--kv", "full", "--chat"],
    ];
    // Files of many megabytes are read first.
    let behind_reading = |output: &Output| {
        let said = text(&output.stderr);
        said.strip_prefix(&format!("reading {data}\n")).unwrap_or(said).to_string()
    };
    for args in commands {
        let output = run(args);
        assert!(stdout(&output).contains("| "), "{args:?}");
        let said = behind_reading(&output);
        assert!(
            said.starts_with("loading facts/recall-1\n") && said.contains(&format!("eval {}: ", args[0])),
            "{said}"
        );
    }
    // It is said before, and not after: a model that cannot be loaded was announced.
    fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    fs::write(snapshot.join("model.safetensors"), "short").unwrap();
    for args in commands {
        let output = run(args);
        let said = behind_reading(&output);
        assert_eq!(output.status.code(), Some(3), "{said}");
        assert!(said.starts_with("loading facts/recall-1\nerror: ") && said.contains("model.safetensors"), "{said}");
    }
    // Random weights have nothing to measure: they are not even made.
    let output = command(&["eval", "ppl", "-m", "synthetic:llama-3-8b", "--tokens", tokens]).output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.starts_with("error: ") && said.contains("no quality to measure"), "{said}");
}

/// What takes long says first what it is: the line comes while a model of 2.5 GB of random weights is still being made. (It
/// comes at once; a second is asked for on a machine that does nothing else, and a test may run on any.) `eval` takes no random
/// weights: `eval_by_a_models_name` looks at what it says before it loads.
#[test]
fn what_takes_long_is_announced() {
    use std::io::{BufRead, BufReader};
    use std::time::{Duration, Instant};
    let ids = folder("announced").join("ids.json");
    fs::write(&ids, "[1, 2, 3]").unwrap();
    let (ids, npy) = (ids.to_str().unwrap(), ids.with_extension("npy"));
    let big = "synthetic:llama-3.2-1b";
    for args in [
        &["generate", "-m", big, "--tokens", ids, "-n", "1"][..],
        &["logits", "-m", big, "--tokens", ids, "--prefill", "1", "-o", npy.to_str().unwrap()],
        &["bench", "-m", big],
        &["bench", "--overlap", "-m", big],
    ] {
        let start = Instant::now();
        let mut child = command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
        let waited = start.elapsed();
        assert!(child.try_wait().unwrap().is_none(), "{args:?}: it has ended");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(["loading ", "measuring "].iter().any(|word| line.starts_with(word)), "{args:?}: {line}");
        assert!(waited < Duration::from_secs(10), "{args:?}: {waited:?}");
    }
}
