//! Dead latents that are begun again live, whatever the latent function, and nothing else changes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use native::train::{Betas, Latents, Params, Rest, Settings, Tensors, Trainer};
use shared::Rows;
use shared::loss::{Objective, Parametrisation, Sparsity};

const D: usize = 6;
const N: usize = 9;
const ROWS: usize = 40;
const DEAD: [u32; 3] = [2, 5, 8];

fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next()).collect()
}

fn objective() -> Objective {
    Objective::plain(Sparsity::None)
}

/// Random weights after a step, with three latents that a bias of −100 keeps silent.
fn trainer(latents: Latents, x: &[f32]) -> Trainer {
    let mut tensors = Tensors::zeros(N, D, D, false);
    tensors.w_enc = noise(1, N * D);
    tensors.w_dec = noise(2, N * D);
    tensors.b_dec = noise(3, D);
    if let Latents::JumpRelu { parametrisation, .. } = latents {
        tensors.own[0] = vec![parametrisation.parameter(0.05) as f32; N];
    }
    for latent in DEAD {
        tensors.b_enc[latent as usize] = -100.0;
        tensors.own[1][latent as usize] = -100.0;
    }
    let mut trainer = Trainer::new(
        Params { d_in: D, d_out: D, tensors, latents, pre_bias: true, encoder_bias: true },
        true,
    );
    let (objective, rows) = (objective(), Rows::new(x, D).unwrap());
    let forward = trainer.forward(rows, rows, &objective).unwrap();
    let betas = Betas { first: 0.9, second: 0.999, eps: 1e-8 };
    let settings = Settings { lr: 1e-3, own_lr: 1e-3, betas, objective: &objective };
    trainer.update(&forward, &settings).unwrap();
    trainer
}

fn length(row: &[f32]) -> f32 {
    row.iter().map(|v| v * v).sum::<f32>().sqrt()
}

#[test]
fn dead_latents_fire_again_and_the_others_stay() {
    let x = noise(4, ROWS * D);
    let rows = Rows::new(&x, D).unwrap();
    let jump = |parametrisation| Latents::JumpRelu { parametrisation, bandwidth: 0.1 };
    for latents in [
        Latents::Relu,
        jump(Parametrisation::Log),
        jump(Parametrisation::Raw),
        Latents::Gated,
        Latents::TopK { k: N },
        Latents::BatchTopK { k: N, threshold: 0.0 },
    ] {
        let before = trainer(latents, &x);
        let forward = before.forward(rows, rows, &objective()).unwrap();
        let dead: Vec<bool> = (0..N as u32).map(|latent| DEAD.contains(&latent)).collect();
        let silent: Vec<u32> = forward.fired(&before.params);
        assert!(DEAD.iter().all(|latent| !silent.contains(latent)), "{latents:?}");

        let mut after = before.clone();
        assert_eq!(after.resample(&Rest::of(&forward), &dead, 7), DEAD, "{latents:?}");
        let (old, new) = (&before.params.tensors, &after.params.tensors);
        let living: Vec<f32> =
            (0..N).filter(|i| !dead[*i]).map(|i| length(&old.w_enc[i * D..][..D])).collect();
        let usual = 0.2 * living.iter().sum::<f32>() / living.len() as f32;
        for i in 0..N {
            let row = |tensor: &Vec<f32>| tensor[i * D..][..D].to_vec();
            if !dead[i] {
                assert_eq!((row(&old.w_enc), row(&old.w_dec)), (row(&new.w_enc), row(&new.w_dec)));
                assert_eq!(
                    before.moments.second.w_enc[i * D..][..D],
                    after.moments.second.w_enc[i * D..][..D]
                );
                continue;
            }
            let (encoder, direction) = (row(&new.w_enc), row(&new.w_dec));
            assert!((length(&direction) - 1.0).abs() < 1e-5 && (length(&encoder) - usual).abs() < 1e-5);
            // Along one of the inputs, less the bias.
            let along = x.chunks_exact(D).map(|x| {
                let input: Vec<f32> = x.iter().zip(&new.b_dec).map(|(x, b)| x - b).collect();
                input.iter().zip(&direction).map(|(a, b)| a * b).sum::<f32>() / length(&input)
            });
            assert!(along.fold(0.0, f32::max) > 0.9999, "{latents:?}");
            let mean: f64 = (0..N)
                .filter(|k| !dead[*k])
                .map(|k| f64::from(before.moments.second.w_enc[k * D]))
                .sum::<f64>()
                / (N - DEAD.len()) as f64;
            assert!((f64::from(after.moments.second.w_enc[i * D]) - mean).abs() <= 1e-6 * mean);
        }
        let again = after.forward(rows, rows, &objective()).unwrap().fired(&after.params);
        assert!(DEAD.iter().all(|latent| again.contains(latent)), "{latents:?}: {again:?}");

        let mut same = before.clone();
        same.resample(&Rest::of(&forward), &dead, 7);
        assert_eq!(same, after);
        let mut other = before.clone();
        other.resample(&Rest::of(&forward), &dead, 8);
        assert_ne!(other, after, "another seed draws other rows");
        let mut none = before.clone();
        assert!(none.resample(&Rest::of(&forward), &[false; N], 7).is_empty() && none == before);
        assert!(
            none.resample(&Rest::of(&forward), &[true; N], 7).is_empty() && none == before,
            "nothing lives to learn from"
        );
    }
}
