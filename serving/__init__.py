"""GEM at scale, on Ray: batch jobs over large data sets.

| module | what |
|---|---|
| `job` | `gem-vllm embed`: plan, actor pool, progress, the count at the end |
| `replica` | one engine that turns shards of rows into Parquet files |
| `output_rows` | what a row becomes in those files, or why it is reported |
| `plan` | which rows are in which shard, and what a job is bound to |
| `manifest` | the plan, and what is finished of it, in the output folder |
| `lock` | one job at a time in a local output folder |
| `inputs` | the rows to embed, whatever format they are in, bad ones included |
| `columnar` | Parquet and Arrow files |
| `lines` | JSON lines, CSV and text |
| `row_values` | rows of untyped values as Arrow columns |
| `job_metrics` | what a replica has done, for Ray's dashboard |
| `vectors` | embeddings as Arrow columns |
| `engine` | vLLM's engine in a thread, fed by tokens |
| `pool` | Ray, and actors with the cores or GPUs of an engine |
| `processor` | the same engine as a step of any Ray Data pipeline |
| `options` | what a job is asked to do |
"""
