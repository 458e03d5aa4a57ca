//! What each HTML element means for plain text.
//!
//! Invariant: knows names and attributes only, no state.

use html5ever::Attribute;
use html5ever::tokenizer::states::RawKind;

/// The role of an element in the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Flows with the text around it.
    Inline,
    /// A paragraph of its own.
    Block,
    /// A heading of this level.
    Heading(usize),
    /// A list, numbered or not.
    List {
        ordered: bool,
    },
    /// An entry of a list.
    Item,
    /// Text whose white space counts.
    Preformatted,
    /// A table, a row or a cell of it.
    Table,
    Row,
    Cell,
    /// A line break.
    Break,
    /// An image: its alternative text.
    Image,
    /// The main content; what stands around it is not part of the document.
    Main,
    /// The title, which stands for a heading if there is none.
    Title,
    /// Never shown, or not part of what the document says: scripts, navigation, controls.
    Hidden,
}

/// The role of an element by its name.
pub fn role(name: &str) -> Role {
    match name {
        "h1" | "h2" | "h3" | "h4" | "h5" | "h6" => Role::Heading(usize::from(name.as_bytes()[1] - b'0')),
        "ul" | "menu" | "dir" => Role::List { ordered: false },
        "ol" => Role::List { ordered: true },
        "li" => Role::Item,
        "pre" | "listing" | "xmp" | "plaintext" => Role::Preformatted,
        "table" => Role::Table,
        "tr" => Role::Row,
        "td" | "th" => Role::Cell,
        "br" => Role::Break,
        "img" => Role::Image,
        "main" => Role::Main,
        "title" => Role::Title,
        "script" | "style" | "template" | "noscript" | "noembed" | "noframes" | "iframe" | "object" | "canvas"
        | "audio" | "video" | "svg" | "nav" | "button" | "select" | "datalist" | "textarea" | "rp" => Role::Hidden,
        "p" | "div" | "address" | "article" | "aside" | "blockquote" | "body" | "caption" | "center" | "dd"
        | "details" | "dialog" | "dl" | "dt" | "fieldset" | "figcaption" | "figure" | "footer" | "form" | "header"
        | "hgroup" | "hr" | "html" | "legend" | "optgroup" | "option" | "search" | "section" | "summary" => Role::Block,
        _ => Role::Inline,
    }
}

/// Whether the attributes take an element out of what a reader sees.
pub fn is_hidden(name: &str, attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &*attribute.name.local {
        "hidden" => !attribute.value.eq_ignore_ascii_case("until-found"),
        "aria-hidden" => attribute.value.eq_ignore_ascii_case("true"),
        "role" => ["navigation", "search", "menu", "menubar", "toolbar"].contains(&&*attribute.value),
        "style" => {
            let style: String = attribute.value.chars().filter(|c| !c.is_whitespace()).collect();
            style.contains("display:none") || style.contains("visibility:hidden")
        }
        _ => false,
    }) || name == "dialog" && !attributes.iter().any(|attribute| &*attribute.name.local == "open")
}

/// Elements that have no content and no end tag.
pub fn is_void(name: &str) -> bool {
    matches!(
        name,
        "area"
            | "base"
            | "br"
            | "col"
            | "embed"
            | "hr"
            | "img"
            | "input"
            | "link"
            | "meta"
            | "source"
            | "track"
            | "wbr"
    )
}

/// Elements whose content is not markup.
pub fn raw_kind(name: &str) -> Option<RawKind> {
    match name {
        "title" | "textarea" => Some(RawKind::Rcdata),
        "script" => Some(RawKind::ScriptData),
        "style" | "xmp" | "iframe" | "noembed" | "noframes" => Some(RawKind::Rawtext),
        _ => None,
    }
}

/// Which open elements a start tag ends, and the elements that it does not look beyond.
pub fn ends(name: &str) -> (&'static [&'static str], &'static [&'static str]) {
    match name {
        "li" => (&["li"], &["ul", "ol", "menu", "table", "td", "th"]),
        "dt" | "dd" => (&["dt", "dd"], &["dl", "table", "td", "th"]),
        "tr" => (&["tr", "caption"], &["table"]),
        "td" | "th" => (&["td", "th", "caption"], &["tr", "table"]),
        "thead" | "tbody" | "tfoot" => (&["thead", "tbody", "tfoot", "caption"], &["table"]),
        "option" => (&["option"], &["select", "datalist", "optgroup"]),
        _ if matches!(role(name), Role::Inline | Role::Image | Role::Break | Role::Title | Role::Hidden)
            && !matches!(name, "nav") =>
        {
            (&[], &[])
        }
        _ => (&["p"], &["button", "caption", "td", "th", "table", "li", "object"]),
    }
}

/// Whether an end tag of `name` may not look beyond an open `open`.
pub fn stops_end_tag(open: &str, name: &str) -> bool {
    match open {
        "table" => !matches!(name, "html" | "body" | "main" | "nav"),
        "td" | "th" | "caption" => !matches!(name, "tr" | "table" | "tbody" | "thead" | "tfoot" | "html" | "body"),
        "template" | "object" => true,
        _ => false,
    }
}
