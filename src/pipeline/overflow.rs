//! What is done about documents that are longer than the model takes.
//!
//! Invariant: the prompt that comes out fits the model with everything that is to be generated, or it is an error.

use crate::job::{ErrorCode, Job, JobError, Overflow, OverflowHandling, ResultFlags};
use crate::prompt::{Instruction, Prompt, Prompter};

/// The prompt of `job` over `documents` (tokens of each) for a model of `at_most` positions.
pub(super) fn fit(
    prompter: &Prompter,
    documents: Vec<Vec<u32>>,
    instruction: &Instruction,
    job: &Job,
    at_most: usize,
    flags: &mut ResultFlags,
) -> Result<Prompt, JobError> {
    let internal =
        |error: crate::model::tokenizer::TokenizerError| JobError::new(ErrorCode::Internal, error.to_string());
    let prompt = prompter.build(&documents, instruction).map_err(internal)?;
    let new_tokens = job.max_new_tokens as usize;
    let Some(excess) = (prompt.len() + new_tokens).checked_sub(at_most).filter(|excess| *excess > 0) else {
        return Ok(prompt);
    };
    let lengths: Vec<usize> = documents.iter().map(Vec::len).collect();
    let total: usize = lengths.iter().sum();
    let room = total.checked_sub(excess).filter(|room| *room > 0);
    match (job.overflow, room) {
        (Overflow::TruncateMiddle, Some(room)) => {
            let mut kept = Vec::with_capacity(documents.len());
            for (document, room) in documents.iter().zip(share(&lengths, room)) {
                kept.push(prompter.truncate_middle(document, room).map_err(internal)?.0);
            }
            flags.input_truncated = true;
            flags.overflow = OverflowHandling::TruncateMiddle;
            prompter.build(&kept, instruction).map_err(internal)
        }
        (Overflow::MapReduce, Some(_)) => {
            let reason = "overflow map_reduce is not supported by this worker; use fail or truncate_middle";
            Err(JobError::new(ErrorCode::ContextTooLong, reason))
        }
        _ => {
            let asked = prompt.len() - total;
            Err(JobError::new(
                ErrorCode::ContextTooLong,
                format!(
                    "{total} tokens of text, {asked} of instruction and {new_tokens} to generate are more than the \
                     {at_most} the model takes"
                ),
            ))
        }
    }
}

/// `room` shared between texts of these lengths: short ones are kept whole, the long ones share the rest.
fn share(lengths: &[usize], room: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_unstable_by_key(|index| lengths[*index]);
    let (mut shares, mut left) = (vec![0; lengths.len()], room);
    for (done, index) in order.iter().enumerate() {
        shares[*index] = lengths[*index].min(left / (lengths.len() - done));
        left -= shares[*index];
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn short_texts_are_kept_whole() {
        assert_eq!(share(&[10, 100, 200], 310), [10, 100, 200]);
        assert_eq!(share(&[10, 100, 200], 110), [10, 50, 50]);
        assert_eq!(share(&[200, 10, 60], 150), [80, 10, 60]);
        assert_eq!(share(&[5, 5], 1), [0, 1]);
    }
}
