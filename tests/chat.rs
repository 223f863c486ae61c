//! Chat templates, as Hugging Face transformers renders them; what is expected here was checked with Jinja2 3.1.6.

use std::fs;
use std::path::PathBuf;

use specache::Error;
use specache::chat::{ChatTemplate, Message};

/// A model folder with these files, in a place of its own.
fn folder(name: &str, files: &[(&str, &str)]) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("chat").join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    files.iter().for_each(|(file, text)| fs::write(dir.join(file), text).unwrap());
    dir
}

const MESSAGES: [Message; 3] = [
    Message { role: "system", content: "Be brief." },
    Message { role: "user", content: "Hi, <you> & \"me\"" },
    Message { role: "assistant", content: " Hello. " },
];

const CONFIG: &str = r#"{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}}"#;

fn render(template: &str) -> Result<String, Error> {
    let name = format!("t{:x}", template.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(b.into())));
    let dir = folder(&name, &[("chat_template.jinja", template), ("tokenizer_config.json", CONFIG)]);
    ChatTemplate::load(&dir)?.expect("a template").render(&MESSAGES, true)
}

/// The shapes of the families: Llama 2, Llama 3, Mistral, Qwen (ChatML). Whitespace as Jinja's trim_blocks and lstrip_blocks
/// leave it.
#[test]
fn families() {
    let chatml = "{%- for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + \
                  '<|im_end|>' + '\\n' }}\n{%- endfor %}\n{% if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' \
                  }}\n{%- endif %}";
    let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi, <you> & \"me\"<|im_end|>\n\
                    <|im_start|>assistant\n Hello. <|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(render(chatml).unwrap(), expected);

    let llama3 = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' \
                  + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}\
                  {% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
                  {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";
    let expected = "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user\
                    <|end_header_id|>\n\nHi, <you> & \"me\"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.\
                    <|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n";
    assert_eq!(render(llama3).unwrap(), expected);

    let llama2 = "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}\
                  {% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}\
                  {{ bos_token ~ '[INST] <<SYS>>' ~ system.strip() ~ '<</SYS>> ' ~ m.content.strip() ~ ' [/INST]' }}\
                  {% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}";
    let expected = "<s>[INST] <<SYS>>Be brief.<</SYS>> Hi, <you> & \"me\" [/INST] Hello. </s>";
    assert_eq!(render(llama2).unwrap(), expected);
}

#[test]
fn python_and_json_as_templates_use_them() {
    let cases = [
        ("{{ messages[1] | tojson }}", r#"{"role": "user", "content": "Hi, <you> & \"me\""}"#),
        ("{{ [1, 'ж'] | tojson(ensure_ascii=False) }}", r#"[1, "ж"]"#),
        ("{{ [1] | tojson(indent=4) }}", "[\n    1\n]"),
        ("{{ messages[0].get('name', 'none') }}", "none"),
        ("{{ messages[0].content.split(' ')[-1] }}", "brief."),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role[0] }}{% endfor %}", "su"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "3"),
        ("{{ 'yes' if tools is defined else 'no' }}", "no"),
        ("{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('a') }}", "aa"),
    ];
    for (template, expected) in cases {
        assert_eq!(render(template).unwrap(), expected, "{template}");
    }
}

/// Templates come with models: none may hang the engine, fill its memory or end it.
#[test]
fn templates_that_misbehave() {
    let nested = format!("{}1{}", "(".repeat(5000), ")".repeat(5000));
    let cases = [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "too long"),
        ("{% for a in range(9999) %}{{ 'x' * 10000000 }}{% endfor %}", "too long"),
        ("{{ '{:>9999999999}'.format(3) }}", "too wide"),
        ("{{ 1.5 | round(2) }}{{ '{:05}{:.3f}{x}'.format(3, 1.5, x='y') }}{{ no.such }}", "undefined"),
        (
            "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
            "not possible as JSON",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages[0].no.such }}", "undefined"),
        ("{{ strftime_now('%Y') }}", "strftime_now"),
        ("{% if %}", "unexpected"),
        (&format!("{{{{ {nested} }}}}"), "recursion"),
    ];
    for (template, words) in cases {
        let error = render(template).unwrap_err();
        let text = error.to_string();
        assert!(error.exit_code() == 3 && text.contains(words) && text.contains("chat_template.jinja"), "{text}");
    }
}

/// However deep a template nests its calls and values, its caller's stack is not what they fill: not even a small one.
#[test]
fn deep_templates_on_a_small_stack() {
    let nest = "{% set n = namespace(x=[]) %}{% for i in range(300) %}{% for j in range(300) %}{% set n.x = [n.x] %}\
                {% endfor %}{% endfor %}";
    let deep = move || {
        let error = render("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}").unwrap_err();
        assert!(error.to_string().contains("recursion"), "{error}");
        for end in ["", "{{ n.x | tojson }}", "{{ n.x | string }}", "{{ n.x }}"] {
            match render(&format!("{nest}{end}")) {
                Ok(text) => assert!(end.is_empty() == text.is_empty()),
                Err(error) => assert_eq!(error.exit_code(), 3, "{error}"),
            }
        }
    };
    std::thread::Builder::new().stack_size(128 << 10).spawn(deep).unwrap().join().unwrap();
}

#[test]
fn refusals_are_the_callers_to_mend() {
    let error = render("{{ raise_exception('Roles must take turns') }}").unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("Roles must take turns"), "{error}");
    let dir = folder("empty", &[("chat_template.jinja", "x")]);
    let error = ChatTemplate::load(&dir).unwrap().unwrap().render(&[], true).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("without messages"), "{error}");
}

#[test]
fn where_templates_are_found() {
    let both = r#"{"chat_template": "config"}"#;
    let named = r#"{"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]}"#;
    let found = |name: &str, files: &[(&str, &str)]| {
        let template = ChatTemplate::load(&folder(name, files));
        template.map(|t| t.map(|t| t.render(&MESSAGES, false).unwrap()))
    };
    let config = "tokenizer_config.json";
    assert_eq!(found("file", &[("chat_template.jinja", "file"), (config, both)]).unwrap().unwrap(), "file");
    assert_eq!(found("config", &[(config, both)]).unwrap().unwrap(), "config");
    assert_eq!(found("named", &[(config, named)]).unwrap().unwrap(), "d");
    assert!(found("none", &[(config, "{}")]).unwrap().is_none());
    assert!(found("nothing", &[]).unwrap().is_none());
    for (name, json, words) in [
        ("json", "{", "not valid JSON"),
        ("number", r#"{"chat_template": 1}"#, "chat_template must be"),
        ("other", r#"{"chat_template": [{"name": "tools", "template": "t"}]}"#, "default"),
    ] {
        let error = found(name, &[(config, json)]).unwrap_err();
        assert!(error.exit_code() == 3 && error.to_string().contains(words), "{error}");
    }
}
