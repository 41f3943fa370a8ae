//! Compares every struct, field and constant of the generated types with the headers of this
//! machine.
//!
//! What the generated file asserts about itself is compiled as C; a release of rdma-core with
//! another layout, and a file generated from the wrong headers, show up here.

use core::mem::offset_of;

use rdma_core_bindings::*;

use crate::c_probe::run_c;

/// Structs that newer releases extend at their end, their users passing a size or a mask.
const GROWING: [&str; 2] = ["ibv_port_attr", "ibv_qp_ex"];

/// Something that C and Rust must agree on.
struct Fact {
    /// A C expression of integer type.
    expression: String,
    value: i128,
    /// The C value may be larger.
    may_grow: bool,
}

impl Fact {
    fn new(expression: String, value: usize) -> Fact {
        Fact {
            expression,
            value: value as i128,
            may_grow: false,
        }
    }

    fn agrees(&self, c: i128) -> bool {
        c == self.value || self.may_grow && c > self.value
    }
}

#[test]
fn types_are_those_of_c() {
    let types = normalized_types();
    let sizes = sizes(&types);
    let offsets = offsets(&types);
    let constants = constants(&types);
    // Guards the parsing below: the headers of rdma-core 44 give 102, 625 and 412.
    assert!(
        sizes.len() >= 90,
        "only {} structs found in types.rs",
        sizes.len()
    );
    assert!(
        offsets.len() >= 500,
        "only {} fields found in types.rs",
        offsets.len()
    );
    assert!(
        constants.len() >= 400,
        "only {} constants found in types.rs",
        constants.len()
    );
    compare(
        "layout",
        sizes.into_iter().chain(offsets).chain(constants).collect(),
    );
}

#[test]
fn members_of_unions_are_where_c_has_them() {
    compare("unions", union_members());
}

fn compare(name: &str, facts: Vec<Fact>) {
    let prints: String = facts
        .iter()
        .map(|fact| {
            format!(
                "    printf(\"%lld\\n\", (long long)({}));\n",
                fact.expression
            )
        })
        .collect();
    let source = format!(
        "#include <stddef.h>\n#include <stdio.h>\n#include <infiniband/verbs.h>\n\
         int main(void) {{\n{prints}    return 0;\n}}\n"
    );
    let Some(output) = run_c(name, &source) else {
        return;
    };
    let values: Vec<i128> = output
        .lines()
        .map(|line| line.parse().expect("a number"))
        .collect();
    assert_eq!(values.len(), facts.len());
    let wrong: Vec<String> = core::iter::zip(&facts, values)
        .filter(|(fact, c)| !fact.agrees(*c))
        .map(|(fact, c)| format!("{}: {} in Rust, {c} in C", fact.expression, fact.value))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("{name}: {} facts agree", facts.len());
}

/// The text of the generated file with every run of white space made one space.
fn normalized_types() -> String {
    include_str!("../../src/types.rs")
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

/// From `["Size of ibv_sge"][::core::mem::size_of::<ibv_sge>() - 16usize];`.
fn sizes(types: &str) -> Vec<Fact> {
    let fact = |(name, value): (&str, usize)| {
        let mut fact = Fact::new(format!("sizeof({})", c_type(types, name)?), value);
        fact.may_grow = GROWING.contains(&name);
        Some(fact)
    };
    assertions(types, "[\"Size of ").filter_map(fact).collect()
}

/// From `["Offset of field: ibv_sge::addr"][::core::mem::offset_of!(ibv_sge, addr) - 0usize];`.
fn offsets(types: &str) -> Vec<Fact> {
    let fact = |(path, value): (&str, usize)| {
        let (name, field) = path.split_once("::").expect("a path to a field");
        let (container, field) = (c_type(types, name)?, c_field(field)?);
        // This struct grows at its front, and everybody finds its fields from its end.
        if name == "verbs_context" {
            let value = size_of::<verbs_context>() - value;
            let expression = format!("sizeof({container}) - offsetof({container}, {field})");
            return Some(Fact::new(expression, value));
        }
        Some(Fact::new(format!("offsetof({container}, {field})"), value))
    };
    assertions(types, "[\"Offset of field: ")
        .filter_map(fact)
        .collect()
}

/// From `pub const IBV_WC_SUCCESS: ibv_wc_status = 0;`.
fn constants(types: &str) -> Vec<Fact> {
    let fact = |item: &str| {
        let (name, rest) = item.split_once(": ").expect("a constant has a type");
        let (_, rest) = rest.split_once("= ").expect("a constant has a value");
        let (value, _) = rest.split_once(';').expect("an item ends");
        let value = value.parse().expect("the constants are integers");
        Fact {
            expression: format!("IBV_{name}"),
            value,
            may_grow: false,
        }
    };
    types.split("pub const IBV_").skip(1).map(fact).collect()
}

/// The name and value of each assertion that starts with `prefix`.
fn assertions<'a>(types: &'a str, prefix: &'a str) -> impl Iterator<Item = (&'a str, usize)> {
    types.split(prefix).skip(1).map(|rest| {
        let (name, rest) = rest.split_once("\"]").expect("the name is a string");
        let (_, rest) = rest.split_once(" - ").expect("the value is subtracted");
        let (value, _) = rest.split_once("usize").expect("the value is a usize");
        (name, value.parse().expect("a number"))
    })
}

/// The C name of a type; none for those of glibc and those that have no name in C.
fn c_type(types: &str, name: &str) -> Option<String> {
    if name.starts_with("__") || name.contains("__bindgen_ty") {
        return None;
    }
    let is_union = types.contains(&format!("pub union {name} "));
    Some(format!(
        "{} {name}",
        if is_union { "union" } else { "struct" }
    ))
}

/// The C name of a field; none for unnamed unions and bit fields.
fn c_field(field: &str) -> Option<&str> {
    let has_name = !field.starts_with("__bindgen") && !field.starts_with("_bitfield");
    let c_name = match field {
        "type_" => "type",
        "priv_" => "priv",
        other => other,
    };
    has_name.then_some(c_name)
}

/// The members of unnamed unions, which the generated assertions do not reach by their C names.
fn union_members() -> Vec<Fact> {
    macro_rules! facts {
        ($($container:ident.$c:literal = $($field:ident).+;)*) => {
            vec![$(Fact::new(
                format!("offsetof(struct {}, {})", stringify!($container), $c),
                offset_of!($container, $($field).+),
            )),*]
        };
    }
    let mut facts = facts! {
        ibv_wc."imm_data" = __bindgen_anon_1.imm_data;
        ibv_wc."invalidated_rkey" = __bindgen_anon_1.invalidated_rkey;
        ibv_send_wr."imm_data" = __bindgen_anon_1.imm_data;
        ibv_send_wr."invalidate_rkey" = __bindgen_anon_1.invalidate_rkey;
        ibv_send_wr."wr.rdma.remote_addr" = wr.rdma.remote_addr;
        ibv_send_wr."wr.rdma.rkey" = wr.rdma.rkey;
        ibv_send_wr."wr.atomic.remote_addr" = wr.atomic.remote_addr;
        ibv_send_wr."wr.atomic.compare_add" = wr.atomic.compare_add;
        ibv_send_wr."wr.atomic.swap" = wr.atomic.swap;
        ibv_send_wr."wr.atomic.rkey" = wr.atomic.rkey;
        ibv_send_wr."wr.ud.ah" = wr.ud.ah;
        ibv_send_wr."wr.ud.remote_qpn" = wr.ud.remote_qpn;
        ibv_send_wr."wr.ud.remote_qkey" = wr.ud.remote_qkey;
        ibv_send_wr."bind_mw.mw" = __bindgen_anon_2.bind_mw.mw;
        ibv_send_wr."bind_mw.rkey" = __bindgen_anon_2.bind_mw.rkey;
        ibv_send_wr."bind_mw.bind_info.mr" = __bindgen_anon_2.bind_mw.bind_info.mr;
        ibv_send_wr."bind_mw.bind_info.addr" = __bindgen_anon_2.bind_mw.bind_info.addr;
        ibv_send_wr."bind_mw.bind_info.length" = __bindgen_anon_2.bind_mw.bind_info.length;
        ibv_async_event."element.cq" = element.cq;
        ibv_async_event."element.qp" = element.qp;
        ibv_async_event."element.srq" = element.srq;
        ibv_async_event."element.port_num" = element.port_num;
    };
    facts.push(Fact::new(
        "offsetof(union ibv_gid, global.interface_id)".into(),
        offset_of!(ibv_gid, global.interface_id),
    ));
    facts.push(Fact::new(
        "(size_t)IBV_ACCESS_OPTIONAL_RANGE".into(),
        IBV_ACCESS_OPTIONAL_RANGE as usize,
    ));
    facts
}
