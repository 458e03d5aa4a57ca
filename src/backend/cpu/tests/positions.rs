//! Rotary positions.

use super::*;

#[test]
fn rope_rotates_queries_and_keys_and_stores_keys_and_values() {
    let rng = &mut StdRng::seed_from_u64(4);
    let shape = HeadShape { heads: 3, kv_heads: 1, head_dim: 4 };
    let inv_freq = [1.0, 0.01];
    let before = random(rng, 5, shape.qkv_width());
    let (mut qkv, mut k, mut v) = (before.clone(), poisoned(6, 4), poisoned(6, 4));
    let kv = KvMut { k: &mut k, v: &mut v, first_row: 3 };
    cpu().rope_store(shape, 1..4, &[7, 8, 60_000], &inv_freq, 1.25, &mut qkv, kv).expect("fits");
    for (row, position) in [(1, 7), (2, 8), (3, 60_000)] {
        for head in 0..4 {
            for (i, frequency) in inv_freq.into_iter().enumerate() {
                let angle = f64::from(position as f32 * frequency);
                let (sin, cos) = (angle.sin() * 1.25, angle.cos() * 1.25);
                let (a, b) = (f64::from(before.row(row)[head * 4 + i]), f64::from(before.row(row)[head * 4 + i + 2]));
                assert_close(qkv.row(row)[head * 4 + i], a * cos - b * sin, 1.0);
                assert_close(qkv.row(row)[head * 4 + i + 2], b * cos + a * sin, 1.0);
            }
        }
        assert_eq!(k.row(row + 2), &qkv.row(row)[12..16]);
        assert_eq!(v.row(row + 2), &before.row(row)[16..20]);
    }
    assert_eq!((qkv.row(0), qkv.row(4)), (before.row(0), before.row(4)));
    assert!(k.row(2)[0].is_nan(), "a row before the first was written");
}
