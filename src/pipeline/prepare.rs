//! A claimed job's documents fetched, decoded and made a prompt.
//!
//! Invariant: what is wrong with a document is this job's error and nobody else's, a panic of a decoder included.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::events::Event;
use super::work::Work;
use super::{Pipeline, overflow};
use crate::document::fetch::Fetched;
use crate::document::{DecodeError, decode};
use crate::engine::InferRequest;
use crate::generate::GenerationOptions;
use crate::job::clean::{clean, needs_cleaning};
use crate::job::{Digest, DocumentFacts, DocumentRef, DocumentUri, ErrorCode, Job, JobError, Stage, TokenCount};
use crate::prompt::{Instruction, Prompter};

/// A document as tokens, and what was learned on the way.
struct Tokenized {
    tokens: Vec<u32>,
    media_type: &'static str,
    encoding: &'static str,
    cleaned: bool,
    decode: Duration,
    tokenize: Duration,
}

impl Pipeline {
    /// The engine's request for the job of `work`, whose facts, times and flags it fills in.
    pub(super) async fn prepare(&self, work: &mut Work) -> Result<InferRequest, JobError> {
        let instruction = instruction(&work.claim.job)?;
        let documents = work.claim.job.documents.clone();
        let mut texts = Vec::with_capacity(documents.len());
        let mut bytes_left = self.settings.documents_at_most_bytes;
        for document in documents {
            work.check()?;
            let fetched = self.fetch(work, &document, bytes_left).await?;
            bytes_left = bytes_left.saturating_sub(fetched.bytes.len() as u64);
            work.check()?;
            texts.push(self.tokenize(work, document, fetched).await?);
        }
        let began = Instant::now();
        let at_most = self.parts.engine.info().max_tokens;
        let job = &work.claim.job;
        let prompt = overflow::fit(&self.parts.prompter, texts, &instruction, job, at_most, &mut work.flags)?;
        work.spent(Stage::Tokenize, began.elapsed());
        let job = &work.claim.job;
        self.parts.events.event(Event::Prompted { job: job.id, tokens: prompt.len() });
        Ok(InferRequest {
            context: prompt.context,
            query: prompt.query,
            query_at: prompt.query_at,
            attention: job.attention.clone(),
            generation: GenerationOptions {
                max_new_tokens: job.max_new_tokens as usize,
                temperature: job.temperature,
                seed: job.seed,
                schema: job.schema.clone(),
                ..GenerationOptions::default()
            },
        })
    }

    async fn fetch(&self, work: &mut Work, document: &DocumentRef, at_most: u64) -> Result<Fetched, JobError> {
        self.enter(work, Stage::Fetch);
        let began = Instant::now();
        let fetched = self.parts.documents.fetch(document, at_most).await;
        work.spent(Stage::Fetch, began.elapsed());
        match fetched {
            Ok(fetched) => {
                work.documents.push(DocumentFacts {
                    bytes: Some(fetched.bytes.len() as u64),
                    version_id: fetched.version_id.clone(),
                    etag: fetched.etag.clone(),
                    ..DocumentFacts::default()
                });
                Ok(fetched)
            }
            Err(error) => Err(JobError::new(error.code(), error.to_string())),
        }
    }

    async fn tokenize(&self, work: &mut Work, document: DocumentRef, fetched: Fetched) -> Result<Vec<u32>, JobError> {
        self.enter(work, Stage::Decode);
        let prompter = self.parts.prompter.clone();
        let working = tokio::task::spawn_blocking(move || {
            let digest = Digest::of_bytes(&fetched.bytes);
            (digest, tokenize(&prompter, &document, &fetched))
        });
        let Ok((digest, tokenized)) = working.await else {
            return Err(JobError::new(ErrorCode::Internal, "the decoder panicked; its message is in the log"));
        };
        let Some(facts) = work.documents.last_mut() else {
            return Err(JobError::new(ErrorCode::Internal, "a document was decoded that was not fetched"));
        };
        facts.digest = Some(digest);
        let tokenized = tokenized?;
        facts.media_type = Some(tokenized.media_type.to_owned());
        facts.encoding = Some(tokenized.encoding.to_owned());
        facts.tokens = Some(TokenCount(tokenized.tokens.len() as u64));
        work.flags.text_cleaned |= tokenized.cleaned;
        work.spent(Stage::Decode, tokenized.decode);
        work.spent(Stage::Tokenize, tokenized.tokenize);
        Ok(tokenized.tokens)
    }

    fn enter(&self, work: &Work, stage: Stage) {
        work.enter(stage);
        self.parts.events.event(Event::Entered { job: work.claim.job.id, stage });
    }
}

fn instruction(job: &Job) -> Result<Instruction, JobError> {
    if let Some(schema) = &job.schema {
        jsonschema::validator_for(schema)
            .map_err(|error| JobError::new(ErrorCode::SchemaUnsupported, format!("schema: {error}")))?;
    }
    Instruction::new(job.task, &job.template, job.instruction.as_deref(), job.schema.as_ref())
        .map_err(|reason| JobError::new(ErrorCode::TemplateUnknown, reason))
}

fn tokenize(prompter: &Arc<Prompter>, document: &DocumentRef, fetched: &Fetched) -> Result<Tokenized, JobError> {
    let began = Instant::now();
    let content_type = document.media_type.as_deref().or(fetched.content_type.as_deref());
    let decoded = decode(&fetched.bytes, &name(&document.uri), content_type)
        .map_err(|error| JobError::new(code(&error), error.to_string()))?;
    let text = decoded.text.as_str();
    let cleaned = needs_cleaning(text) || decoded.replaced > 0;
    let text = clean(text);
    let decode = began.elapsed();
    let began = Instant::now();
    let tokens = prompter.document(&text);
    let tokens = tokens.map_err(|error| JobError::new(ErrorCode::Internal, error.to_string()))?;
    Ok(Tokenized {
        tokens,
        media_type: decoded.media_type.name(),
        encoding: decoded.encoding,
        cleaned,
        decode,
        tokenize: began.elapsed(),
    })
}

/// The document's own name, for its extension.
fn name(uri: &DocumentUri) -> String {
    match uri {
        DocumentUri::S3 { key, .. } => key.rsplit('/').next().unwrap_or_default().to_owned(),
        DocumentUri::File { path } => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
    }
}

fn code(error: &DecodeError) -> ErrorCode {
    match error {
        DecodeError::Empty { .. } | DecodeError::NoTextLayer { .. } => ErrorCode::DocumentEmpty,
        DecodeError::NotText { .. } => ErrorCode::DocumentNotText,
        DecodeError::Unsupported { .. } => ErrorCode::MediaTypeUnsupported,
        DecodeError::Malformed { .. } => ErrorCode::DocumentCorrupt,
        DecodeError::Encrypted => ErrorCode::DocumentEncrypted,
        DecodeError::Reader { .. } => ErrorCode::Internal,
    }
}
