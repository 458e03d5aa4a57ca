use super::*;
use crate::document::encoding;
use proptest::prelude::*;

fn page(html: &str) -> Text {
    encoding::decode(html.as_bytes(), None).expect("text").text
}

fn text(html: &str) -> String {
    to_text(&page(html)).expect("a page").as_str().to_owned()
}

#[test]
fn structure_becomes_markdown() {
    let cases: &[(&str, &str)] = &[
        ("<h1>A</h1><h2 id=x><a href=y>B</a></h2><p>c\n  d", "# A\n\n## B\n\nc d"),
        ("<p>one<p>two<div>three</div>four", "one\n\ntwo\n\nthree\n\nfour"),
        ("<ul><li>a<li>b<ul><li>c</ul><li>d</ul>e", "- a\n- b\n  - c\n- d\n\ne"),
        ("<p>x<ul> <li>a\n<li><p>b</p>\n</ul>", "x\n\n- a\n- b"),
        ("<ol><li>a</li><li><p>b</p><p>c</p></li></ol>", "1. a\n2. b\n\nc"),
        ("a<br>b<br/>c", "a\nb\nc"),
        ("<pre><code>fn x() {\n    y &lt; 1\n}\n</code></pre><p>z", "```\nfn x() {\n    y < 1\n}\n```\n\nz"),
        ("<pre></pre>x", "x"),
        ("<table><tr><th>k<th>v<tr><td>a<td><p>b</p><p>c</p></table>d", "| k | v |\n| a | b c |\n\nd"),
        ("<table><tr><td></td><td>x</td><td></td></tr></table>", "|  | x |  |"),
        ("<p>see <a href=z>the <b>link</b></a>.<img src=i alt='A cat'></p>", "see the link.A cat"),
        ("<dl><dt>t<dd>d<dt>u<dd>e</dl>", "t\n\nd\n\nu\n\ne"),
        ("a &amp; b&nbsp;c &#x41;&hellip; &bogus; &copy", "a & b c A… &bogus; ©"),
    ];
    for (html, expected) in cases {
        assert_eq!(text(html), *expected, "{html}");
    }
}

#[test]
fn what_a_reader_does_not_see_is_left_out() {
    let cases: &[(&str, &str)] = &[
        ("a<script>if (1 < 2) { b('</p>') }</script>c", "ac"),
        ("a<style>p > b { }</style><template>x</template><noscript>y</noscript>c", "ac"),
        ("<nav><ul><li>home</ul></nav><p>text</p>", "text"),
        ("<div hidden><p>x</div><p aria-hidden=true>y<p>z", "z"),
        ("<p style='color:red; display : none'>x</p>y", "y"),
        ("<div role=navigation>x</div><button>copy</button>y", "y"),
        ("<svg><title/><text>x</text></svg>y<select><option>z</select>", "y"),
        ("<head><title>T</title></head><body>y", "# T\n\ny"),
        ("<title>T</title><h1>H</h1>y", "# H\n\ny"),
        ("<!-- no --><!doctype html>y<![CDATA[z]]>", "y"),
    ];
    for (html, expected) in cases {
        assert_eq!(text(html), *expected, "{html}");
    }
}

#[test]
fn only_the_main_content_counts_if_there_is_one() {
    assert_eq!(text("<h1>Menu</h1><main><p>text</main><footer>x</footer>"), "text");
    assert_eq!(text("<title>T</title><p>a<main></main><p>b"), "# T\n\na\n\nb");
    assert_eq!(text("<div><main><h2>A</h2>never closed"), "## A\n\nnever closed");
}

#[test]
fn broken_nesting_hides_no_more_than_it_must() {
    assert_eq!(text("<section><div hidden>x</section>y"), "y");
    assert_eq!(text("<table><tr><td>a</div></p>b</table>"), "| a b |");
    assert_eq!(text("</p></li>a</b>c"), "ac");
}

#[test]
fn offsets_lead_back_to_the_page() {
    let html = "<title>no</title><h1>First &amp; last</h1>\n<p>We\u{2019}ll  meet <b>again</b>.</p>";
    let source = page(html);
    let text = to_text(&source).expect("a page");
    for word in ["First", "last", "We\u{2019}ll", "meet", "again"] {
        let at = text.as_str().find(word).expect("the word");
        let range = text.source_of(at..at + word.len()).expect("a place");
        assert_eq!(&html[range], word);
    }
    let at = text.as_str().find('&').expect("the ampersand");
    assert_eq!(&html[text.source_of(at..at + 1).expect("a place")], "&amp;");
}

#[test]
fn hostile_pages_end() {
    let deep = "<div>".repeat(50_000) + "x";
    assert_eq!(text(&deep), "x");
    let lists = "<ul><li>".repeat(20_000) + "x";
    assert!(text(&lists).len() < 100);
    let unclosed = "<b><i><a href=x>".repeat(10_000) + &"</p></li></td>".repeat(10_000) + "end";
    assert!(text(&unclosed).ends_with("end"));
    let attributes = format!("<a {}>x", (0..5_000).map(|i| format!("b{i} ")).collect::<String>());
    assert!(matches!(to_text(&page(&attributes)), Err(DecodeError::Malformed { .. })));
}

proptest! {
    #[test]
    fn arbitrary_markup_never_panics(parts in proptest::collection::vec(
        prop_oneof![
            Just("<p>"), Just("</p>"), Just("<pre>"), Just("</pre>"), Just("<table>"), Just("<tr>"), Just("<td>"), Just("</table>"),
            Just("<ul>"), Just("<li>"), Just("</ul>"), Just("<main>"), Just("</main>"), Just("<nav>"), Just("</nav>"), Just("<h2>"),
            Just("</h2>"), Just("<script>"), Just("</script>"), Just("<svg>"), Just("</svg>"), Just("&amp;"), Just("&"), Just("é w"),
            Just("<title>"), Just("<plaintext>"), Just("<!--"), Just("-->"), Just("<"), Just(">"), Just("\n"), Just(" \u{a0}x"),
        ],
        0..60,
    )) {
        let html: String = parts.concat();
        let source = page(&html);
        let text = to_text(&source).expect("a page");
        prop_assert_eq!(text.as_str().trim_start_matches('\n'), text.as_str());
        for range in [0..text.as_str().len(), 0..1, 3..9] {
            if let Some(place) = text.source_of(range) {
                prop_assert!(place.end <= html.len());
            }
        }
    }
}
