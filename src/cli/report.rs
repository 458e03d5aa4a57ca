//! `apbd report`: the report views, as SQL has them.

use crate::store::ReportView;

use super::database::{DatabaseArgs, Format, cell, print_json, print_table};
use super::{CliError, Status, print, runtime};

/// Arguments of `apbd report`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    database: DatabaseArgs,
    /// backlog, throughput_hourly, latency, tokens, failures or jobs; without one, all but the last.
    #[arg(value_name = "VIEW")]
    view: Option<ReportView>,
    /// Rows at most.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: u32,
    /// How to print them.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

impl Args {
    /// Prints the reports.
    pub fn execute(self) -> Result<Status, CliError> {
        let views: Vec<ReportView> = match self.view {
            Some(view) => vec![view],
            None => ReportView::ALL.into_iter().filter(|view| *view != ReportView::Jobs).collect(),
        };
        let tables = runtime()?.block_on(async {
            let store = self.database.open().await?;
            let mut tables = Vec::with_capacity(views.len());
            for view in &views {
                tables.push(store.report(*view, self.limit).await?);
            }
            store.close().await;
            Ok::<_, CliError>(tables)
        })?;
        if self.format == Format::Json {
            let named: serde_json::Map<_, _> = views
                .iter()
                .zip(&tables)
                .map(|(view, table)| (view.as_str().to_owned(), serde_json::json!(table)))
                .collect();
            print_json(&named)?;
            return Ok(Status::Done);
        }
        for (view, table) in views.iter().zip(tables) {
            if self.view.is_none() {
                print(&format!("report_{}\n", view.as_str()))?;
            }
            print_table(&table.columns, table.rows.iter().map(|row| row.iter().map(cell).collect()).collect())?;
            if self.view.is_none() {
                print("\n")?;
            }
        }
        Ok(Status::Done)
    }
}
