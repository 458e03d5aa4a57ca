//! Weights, linear layers, norms.

use super::*;

#[test]
fn linear_layers_of_few_and_many_rows() {
    let rng = &mut StdRng::seed_from_u64(1);
    for (rows, inputs, outputs) in [
        (1, 7, 5),
        (3, 64, 300),
        (15, 33, 17),
        (16, 65, 31),
        (128, 40, 33),
        (129, 40, 70),
        (1, 600, 700),
        (32, 9, 1030),
        (300, 40, 1100),
    ] {
        let (x, w, b) = (random(rng, rows + 1, inputs), random(rng, outputs, inputs), random(rng, 1, outputs));
        let (w, b) = (weight(&w), weight(&b));
        let mut out = poisoned(rows + 1, outputs);
        cpu().linear(rows, &x, &w, Some(&b), false, &mut out).expect("shapes fit");
        let mut twice = out.clone();
        cpu().linear(rows, &x, &w, None, true, &mut twice).expect("shapes fit");
        for row in 0..rows {
            for col in 0..outputs {
                let expected = product(x.row(row), &w, col);
                let bias = f64::from(b.matrix().data()[col]);
                assert_close(out.row(row)[col], expected + bias, inputs as f64);
                assert_close(twice.row(row)[col], 2.0 * expected + bias, inputs as f64);
            }
        }
        assert!(out.row(rows).iter().all(|value| value.is_nan()), "a row beyond the first {rows} was touched");
    }
}

#[test]
fn mlp_of_few_and_many_rows() {
    let rng = &mut StdRng::seed_from_u64(2);
    for (rows, hidden, inner) in [(1, 12, 20), (9, 16, 33), (16, 8, 5), (131, 24, 40), (1100, 17, 9)] {
        let (h, gate_up, down) =
            (random(rng, rows, hidden), weight(&random(rng, 2 * inner, hidden)), weight(&random(rng, hidden, inner)));
        let before = random(rng, rows, hidden);
        let mut x = before.clone();
        cpu().mlp(rows, &h, &gate_up, &down, &mut x).expect("shapes fit");
        for row in 0..rows {
            let gated: Vec<f32> = (0..inner)
                .map(|i| (silu(product(h.row(row), &gate_up, i)) * product(h.row(row), &gate_up, inner + i)) as f32)
                .collect();
            for col in 0..hidden {
                let expected = f64::from(before.row(row)[col]) + product(&gated, &down, col);
                assert_close(x.row(row)[col], expected, inner as f64);
            }
        }
    }
}

#[test]
fn the_parts_of_an_mlp_add_up_to_it() {
    let rng = &mut StdRng::seed_from_u64(14);
    for (rows, hidden, inner) in [(1, 12, 24), (9, 16, 40), (131, 24, 35), (1100, 17, 16)] {
        let (h, gate_up, down) =
            (random(rng, rows, hidden), weight(&random(rng, 2 * inner, hidden)), weight(&random(rng, hidden, inner)));
        let before = random(rng, rows, hidden);
        let (mut whole, mut added) = (before.clone(), before);
        cpu().mlp(rows, &h, &gate_up, &down, &mut whole).expect("shapes fit");
        let parts = [0..8, 8..8, 8..16, 16..inner];
        let mut partials = cpu().scores(parts.len() * rows + 1, hidden).expect("fits");
        partials.data_mut().fill(f32::NAN);
        for (index, part) in parts.iter().enumerate() {
            cpu().mlp_part(rows, &h, &gate_up, &down, part.clone(), &mut partials, index * rows).expect("shapes fit");
        }
        cpu().add_partials(rows, parts.len(), &partials, &mut added).expect("shapes fit");
        for row in 0..rows {
            for col in 0..hidden {
                assert_close(added.row(row)[col], f64::from(whole.row(row)[col]), inner as f64);
            }
        }
        assert!(partials.row(parts.len() * rows).iter().all(|value| value.is_nan()), "a row beyond was touched");
        let beyond = cpu().mlp_part(rows, &h, &gate_up, &down, 0..inner + 1, &mut partials, 0);
        assert!(beyond.is_err(), "a part beyond the width");
    }
}

#[test]
fn weights_of_every_type_are_stacked_and_checked() {
    let f16: Vec<u8> = [1.5_f32, -2.0].iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
    let bf16: Vec<u8> = [0.5_f32, 3.0].iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
    let view = |dtype, bytes| WeightView { rows: 1, cols: 2, dtype, bytes };
    let stacked = cpu().weight_stacked(&[view(DType::F16, &f16), view(DType::Bf16, &bf16)]).expect("fits");
    assert_eq!(stacked.matrix().data(), [1.5, -2.0, 0.5, 3.0]);
    let nan: Vec<u8> = [1.0_f32, f32::NAN].iter().flat_map(|v| v.to_le_bytes()).collect();
    let error = cpu().weight(view(DType::F32, &nan)).expect_err("not finite").to_string();
    assert!(error.contains("row 0, column 1"), "{error}");
    assert!(cpu().weight(view(DType::F32, &f16)).is_err(), "too few bytes");
}

#[test]
fn embedding_norm_and_logits() {
    let rng = &mut StdRng::seed_from_u64(3);
    let (table, norm) = (weight(&random(rng, 9, 6)), weight(&random(rng, 1, 6)));
    let mut x = poisoned(4, 6);
    cpu().embed(&table, &[3, 8, 3], &mut x).expect("fits");
    assert_eq!((x.row(0), x.row(1), x.row(2)), (table.matrix().row(3), table.matrix().row(8), table.matrix().row(3)));
    assert!(cpu().embed(&table, &[9], &mut x).is_err(), "a token beyond the vocabulary");
    let mut out = poisoned(3, 6);
    cpu().rms_norm(3, &x, &norm, 1e-5, &mut out).expect("fits");
    let head = Head { norm: &norm, epsilon: 1e-5, weights: &table };
    let mut logits = Scores::from_vec(4, 9, vec![f32::NAN; 36]);
    cpu().logits(3, &x, &head, 0..9, &mut logits, 1).expect("fits");
    let mean: f64 = x.row(1).iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 6.0;
    for i in 0..6 {
        assert_close(
            out.row(1)[i],
            f64::from(x.row(1)[i]) / (mean + 1e-5).sqrt() * f64::from(norm.matrix().data()[i]),
            1.0,
        );
    }
    for (row, token) in (0..3).flat_map(|row| (0..9).map(move |token| (row, token))) {
        assert_close(logits.row(1 + row)[token], product(out.row(row), &table, token), 6.0);
    }
    assert!(logits.row(0).iter().all(|logit| logit.is_nan()));
    assert!(cpu().logits(1, &x, &head, 1..10, &mut logits, 0).is_err(), "a token beyond the vocabulary");
}

#[test]
fn a_bias_is_added_to_what_is_there() {
    let rng = &mut StdRng::seed_from_u64(13);
    for rows in [1, 50] {
        let (x, w, b) = (random(rng, rows, 6), weight(&random(rng, 5, 6)), weight(&random(rng, 1, 5)));
        let before = random(rng, rows, 5);
        let mut out = before.clone();
        cpu().linear(rows, &x, &w, Some(&b), true, &mut out).expect("shapes fit");
        for row in 0..rows {
            for col in 0..5 {
                let added = product(x.row(row), &w, col) + f64::from(b.matrix().data()[col]);
                assert_close(out.row(row)[col], f64::from(before.row(row)[col]) + added, 6.0);
            }
        }
    }
}

#[test]
fn the_first_bad_element_of_a_weight_is_named() {
    let (rows, cols) = (300, 500);
    for (bad, value) in [(0, f32::NAN), (70_001, f32::INFINITY), (rows * cols - 1, f32::NEG_INFINITY)] {
        let mut values = vec![1.0_f32; rows * cols];
        values[bad..].fill(value);
        let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let f16s: Vec<u8> = values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
        let bf16s: Vec<u8> = values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
        for (dtype, bytes) in [(DType::F32, &f32s), (DType::F16, &f16s), (DType::Bf16, &bf16s)] {
            let error = cpu().weight(WeightView { rows, cols, dtype, bytes }).expect_err("not finite").to_string();
            let place = format!("element {bad} (row {}, column {})", bad / cols, bad % cols);
            assert!(error.contains(&place), "{error}");
        }
    }
}

#[test]
fn stacked_weights_have_one_width() {
    let bytes = [0; 24];
    let view = |rows, cols| WeightView { rows, cols, dtype: DType::F32, bytes: &bytes };
    let stacked = cpu().weight_stacked(&[view(2, 3), view(2, 3)]).expect("of one width");
    assert_eq!((stacked.rows(), stacked.cols()), (4, 3));
    assert!(cpu().weight_stacked(&[view(2, 3), view(3, 2)]).is_err());
}

#[test]
fn rows_are_copied_to_their_place() {
    let rng = &mut StdRng::seed_from_u64(14);
    let (src, mut dst) = (random(rng, 5, 3), poisoned(6, 3));
    cpu().copy_rows(&src, 2, 3, &mut dst, 1).expect("fits");
    assert_eq!(dst.data()[3..12], src.data()[6..15]);
    assert!(dst.row(0)[0].is_nan() && dst.row(4)[0].is_nan());
    assert!(cpu().copy_rows(&src, 3, 3, &mut dst, 0).is_err(), "beyond the source");
    assert!(cpu().copy_rows(&src, 0, 3, &mut dst, 4).is_err(), "beyond the destination");
}

#[test]
fn wrong_shapes_are_named() {
    let mut out = Matrix::zeros(2, 3);
    let w = weight(&Matrix::zeros(3, 5));
    let error = cpu().linear(2, &Matrix::zeros(2, 4), &w, None, false, &mut out).expect_err("4 is not 5");
    assert_eq!(error.to_string(), "linear: expected x of at least 2 rows, 5 columns, got [2, 4]");
}
