//! From a request to a plan: how many hosts, which tokens each has, what the anchor is made of, how much is passed on.
//!
//! Invariant: whatever differs from the request is said in `notes`.

use std::ops::Range;

use super::{
    Anchor, AttentionMode, AttentionRequest, Capabilities, Host, PassingType, PlanError, PrefillPlan, Selector,
    settings,
};

impl PrefillPlan {
    /// Cuts a context of `context` tokens, followed by a query of `query` tokens. The first `query_at` tokens of the context stand
    /// before the document (BOS, system prompt, header); in the anchor the query follows them.
    pub fn new(
        context: usize,
        query: usize,
        query_at: usize,
        request: &AttentionRequest,
        capabilities: Capabilities,
    ) -> Result<Self, PlanError> {
        check(context, query, query_at)?;
        let mode = request.mode.unwrap_or_else(|| settings::mode(context));
        let mut notes = Vec::new();
        let asked = hosts_asked_for(mode, context, request, capabilities, &mut notes)?;
        let blocks = blocks(context, asked, &mut notes);
        let selector = selector(mode, request, capabilities, &mut notes)?;
        let anchor = match mode {
            AttentionMode::Full | AttentionMode::Ring | AttentionMode::Ulysses => None,
            _ if blocks.len() == 1 => None,
            AttentionMode::Star => star_anchor(context, blocks[0].len(), request, &mut notes),
            AttentionMode::Apb => apb_anchor(context, query, query_at, blocks[0].len(), request, &mut notes),
        };
        let passing = match selector {
            Selector::None => 0,
            _ => request.passing.unwrap_or_else(|| settings::passing(context, blocks.len())),
        };
        let hosts = hosts(blocks, anchor.as_ref().map_or(0, |anchor| anchor.len), passing);
        let selector = if hosts.iter().any(|host| host.compressed > 0) { selector } else { Selector::None };
        let hosts = with_budget(hosts, context, request, capabilities, &mut notes)?;
        let exact = (mode.is_exact() || hosts.len() == 1) && hosts.iter().all(|host| host.kept.is_none());
        let execution = request.execution;
        let plan = Self { mode, context, query, hosts, anchor, selector, exact, execution, notes };
        Ok(plan.with_passing_type_noted())
    }

    fn with_passing_type_noted(mut self) -> Self {
        if self.passes_in_fp8() {
            self.notes.push("passing blocks are quantised to FP8 (e4m3), which costs some exactness".to_owned());
        } else if self.execution.passing_type == PassingType::Fp8 {
            self.notes.push("there are no passing blocks to quantise to FP8".to_owned());
        }
        self
    }
}

fn check(context: usize, query: usize, query_at: usize) -> Result<(), PlanError> {
    if context == 0 {
        return Err(PlanError::EmptyContext);
    }
    if query == 0 {
        return Err(PlanError::EmptyQuery);
    }
    if query_at > context {
        return Err(PlanError::QueryAt { query_at, context });
    }
    match context.checked_add(query) {
        Some(tokens) if u32::try_from(tokens).is_ok() => Ok(()),
        _ => Err(PlanError::TooLong { tokens: context.saturating_add(query) }),
    }
}

fn hosts_asked_for(
    mode: AttentionMode,
    context: usize,
    request: &AttentionRequest,
    capabilities: Capabilities,
    notes: &mut Vec<String>,
) -> Result<usize, PlanError> {
    let max_hosts = capabilities.max_hosts;
    let asked = request.hosts.unwrap_or(settings::hosts(context).min(max_hosts));
    if asked == 0 || asked > max_hosts {
        return Err(PlanError::Hosts { hosts: asked, max_hosts });
    }
    if mode == AttentionMode::Full {
        if request.hosts.is_some_and(|hosts| hosts > 1) {
            notes.push(format!("full attention uses 1 host, not {asked}"));
        }
        return Ok(1);
    }
    Ok(asked)
}

/// Local blocks of `ceil(n / hosts)` tokens; hosts that would get none are left out.
fn blocks(context: usize, hosts: usize, notes: &mut Vec<String>) -> Vec<Range<usize>> {
    let length = context.div_ceil(hosts);
    let used = context.div_ceil(length);
    if used < hosts {
        notes.push(format!("{used} hosts instead of {hosts}: blocks of {length} tokens leave nothing for the others"));
    }
    (0..used).map(|host| host * length..context.min((host + 1) * length)).collect()
}

/// Only APB passes blocks on.
fn selector(
    mode: AttentionMode,
    request: &AttentionRequest,
    capabilities: Capabilities,
    notes: &mut Vec<String>,
) -> Result<Selector, PlanError> {
    if mode != AttentionMode::Apb {
        if request.passing.is_some_and(|passing| passing > 0)
            || !matches!(request.selector, None | Some(Selector::None))
        {
            notes.push(format!("{} attention has no passing blocks", name(mode)));
        }
        if mode.is_exact() && request.anchor.is_some_and(|anchor| anchor > 0) {
            notes.push(format!("{} attention has no anchor", name(mode)));
        }
        return Ok(Selector::None);
    }
    match request.selector {
        None if capabilities.has_retaining_heads => Ok(Selector::RetainingHead),
        None => Ok(Selector::QueryAware),
        Some(Selector::RetainingHead) if !capabilities.has_retaining_heads => Err(PlanError::NoRetainingHeads),
        Some(selector) => Ok(selector),
    }
}

fn name(mode: AttentionMode) -> &'static str {
    match mode {
        AttentionMode::Full => "full",
        AttentionMode::Ring => "ring",
        AttentionMode::Ulysses => "Ulysses",
        AttentionMode::Star => "star",
        AttentionMode::Apb => "APB",
    }
}

/// The first tokens of the context; as many as a block has unless asked otherwise.
fn star_anchor(context: usize, block: usize, request: &AttentionRequest, notes: &mut Vec<String>) -> Option<Anchor> {
    if request.query_in_anchor == Some(true) {
        notes.push("the anchor of star attention does not hold the query".to_owned());
    }
    context_anchor(request.anchor.unwrap_or(block), context, notes)
}

/// `context[..query_at] ++ query ++ context[query_at..]`, cut to the anchor's length; without the query where it does not fit.
fn apb_anchor(
    context: usize,
    query: usize,
    query_at: usize,
    block: usize,
    request: &AttentionRequest,
    notes: &mut Vec<String>,
) -> Option<Anchor> {
    let with_query = request.query_in_anchor != Some(false);
    let length = request.anchor.unwrap_or_else(|| {
        // A default that is too short for the query would lose more than it saves.
        let least = if with_query { query_at + query } else { 0 };
        settings::anchor(context).max(least).min(block)
    });
    if !with_query {
        return context_anchor(length, context, notes);
    }
    if query_at + query > length {
        notes.push(format!(
            "the query is left out of the anchor: {query_at} tokens before it and {query} of its own do not fit into {length}"
        ));
        return context_anchor(length, context, notes);
    }
    let len = shortened(length, context + query, notes);
    Some(Anchor { head: query_at, has_query: true, tail: len - query - query_at, len })
}

fn context_anchor(length: usize, context: usize, notes: &mut Vec<String>) -> Option<Anchor> {
    let len = shortened(length, context, notes);
    (len > 0).then_some(Anchor { head: len, has_query: false, tail: 0, len })
}

fn shortened(length: usize, available: usize, notes: &mut Vec<String>) -> usize {
    if length > available {
        notes.push(format!("an anchor of {available} tokens instead of {length}: there are no more"));
    }
    length.min(available)
}

/// Host 0 never passes on what is in everybody's anchor; nobody comes after the last one.
fn hosts(blocks: Vec<Range<usize>>, anchor: usize, passing: usize) -> Vec<Host> {
    let last = blocks.len() - 1;
    let host = |(index, local): (usize, Range<usize>)| {
        let excluded = if index == 0 { anchor.min(local.len()) } else { 0 };
        let compressed = if index == last { 0 } else { passing.min(local.len() - excluded) };
        Host { local, excluded, compressed, kept: None }
    };
    blocks.into_iter().enumerate().map(host).collect()
}

/// Each host keeps its part of the budget, in proportion to its tokens.
fn with_budget(
    mut hosts: Vec<Host>,
    context: usize,
    request: &AttentionRequest,
    capabilities: Capabilities,
    notes: &mut Vec<String>,
) -> Result<Vec<Host>, PlanError> {
    let Some(budget) = request.kv_budget.filter(|budget| *budget < context) else { return Ok(hosts) };
    if budget == 0 {
        return Err(PlanError::NoBudget);
    }
    if !capabilities.has_retaining_heads {
        return Err(PlanError::NoRetainingHeads);
    }
    for host in &mut hosts {
        host.kept = Some((budget * host.local.len()).div_ceil(context));
    }
    let kept: usize = hosts.iter().map(Host::kept_rows).sum();
    notes.push(format!(
        "keys and values of {kept} tokens of {context} are kept, per head, for the query and the output"
    ));
    Ok(hosts)
}
