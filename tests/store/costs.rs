//! Learned rates: the sums of the database are those of the program, and nobody's observation is lost.

use apbd::cost::{Learned, MEMORY, Observation, Place, Work};

use crate::suite::Fresh;

fn place(device: &str, ranks: u32) -> Place {
    Place { model_digest: "sha256:1".to_owned(), device: device.to_owned(), ranks }
}

fn observation(place: &Place, work: Work, observed_s: f64) -> Observation {
    Observation { place: place.clone(), work, predicted_s: 2.0, observed_s }
}

fn near(one: f64, other: f64) -> bool {
    (one - other).abs() < 1e-9
}

pub async fn what_inferences_take_is_learned(fresh: Fresh) {
    let store = &fresh.store;
    let (one, two) = (place("a GPU", 1), place("a GPU", 2));
    let mut expected = Learned::default();
    for step in 0..2 * MEMORY {
        let seen = observation(&one, Work::Prefill, 2.0 + f64::from(step % 7));
        store.cost_observe(&seen).await.expect("observed");
        expected.observe(&seen);
    }
    let generated = observation(&one, Work::Generate, 1.0);
    store.cost_observe(&generated).await.expect("observed");
    expected.observe(&generated);
    store.cost_observe(&observation(&two, Work::Prefill, 4.0)).await.expect("observed");
    for senseless in [0.0, f64::NAN, f64::INFINITY, -1.0] {
        store.cost_observe(&observation(&two, Work::Prefill, senseless)).await.expect("passed over");
    }
    let learned = store.cost_learned("sha256:1").await.expect("asked");
    assert_eq!(learned.iter().map(|(place, _)| place.clone()).collect::<Vec<_>>(), [one, two]);
    let (kept, of_program) = (learned[0].1.prefill.expect("a rate"), expected.prefill.expect("a rate"));
    assert_eq!(kept.observations, u64::from(2 * MEMORY));
    assert!(near(kept.ln_factor, of_program.ln_factor) && near(kept.ln_variance, of_program.ln_variance), "{kept:?}");
    assert!(kept.ln_variance > 0.0);
    assert!(near(learned[0].1.factor(Work::Generate), 0.5) && near(learned[1].1.factor(Work::Prefill), 2.0));
    assert_eq!(learned[1].1.bound(Work::Generate), None);
    assert!(store.cost_learned("sha256:2").await.expect("asked").is_empty());
}

pub async fn nothing_that_is_observed_is_lost(fresh: Fresh) {
    let place = place("a GPU", 1);
    let tasks: Vec<_> = (0..4)
        .map(|_| {
            let (store, seen) = (fresh.store.clone(), observation(&place, Work::Prefill, 6.0));
            tokio::spawn(async move {
                for _ in 0..10 {
                    store.cost_observe(&seen).await.expect("observed");
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("ended");
    }
    let learned = fresh.store.cost_learned("sha256:1").await.expect("asked");
    let rate = learned[0].1.prefill.expect("a rate");
    assert_eq!(rate.observations, 40);
    assert!(near(rate.ln_factor, 3.0f64.ln()) && near(rate.ln_variance, 0.0), "{rate:?}");
}
