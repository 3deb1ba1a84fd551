"""Bad commands and inputs: files that a hostile hand would write, and command lines with what each is answered."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

ESC = "\x1b[31m"
LIST = {"candidates": [{"title": "A"}, {"title": "B"}]}
ROW = {"prompt": "a", "chosen": "b", "rejected": ["c"]}
HEAD = "user_id,item_id,rating,timestamp\n"


def write_files(folder: Path) -> None:
    """The files that the command lines name, below `folder`."""
    deep, text = "[" * 100_000, json.dumps(LIST)
    bomb = "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9))
    files = {
        "deep.json": deep,
        "deep_in.json": f'{{"candidates":[{{"title":{deep}{"]" * 100_000}}}]}}',
        "deep.yaml": "a: " + deep[:50_000],
        "bomb.yaml": f"a: &a [{','.join('x' * 9)}]\n{bomb}",
        "cycle.yaml": "a: &a [*a]\n",
        "twice.yaml": "learning_rate: 1e-3\nlearning_rate: 1e-4\n",
        "code.yaml": "!!python/object/apply:os.mkdir [owned]\n",
        "date.yaml": "learning_rate: 2024-13-45\n",
        "digits.yaml": f"seed: {'9' * 5000}\n",
        "list.yaml": "learning_rate: [1, 2]\n",
        "number.yaml": "1: 2\n",
        "null.yaml": 'output_dir: "a\\0b"\n',
        "escape.yaml": '"\\e[31mx": 1\n',
        "empty.yaml": "",
        "tab.yaml": "a:\n\tb: 1\n",
        "large.yaml": "# x\n" * 300_000,
        "wide.yaml": "learning_rate: 1e-3\n".encode("utf-16"),
        "bytes.yaml": b"\x80\x81\x82",
        "wide.json": text.encode("utf-16"),
        "bytes.json": b"\x80\x81\x82",
        "twice.json": text[:-1] + ',"candidates":[]}',
        "twice_in.json": '{"candidates":[{"title":"A","title":"X"},{"title":"B"}]}',
        "escape.json": json.dumps({ESC: 1} | LIST),
        "long_key.json": json.dumps({"x" * 5_000_000: 1} | LIST),
        "long_id.json": json.dumps({"candidates": [{"id": "x" * 5_000_000, "title": "A"}] * 2}),
        "same.json": json.dumps({"candidates": [{"id": ESC, "title": "A"}, {"id": ESC, "title": "B"}]}),
        "empty.json": "",
        "null.json": "null",
        "number.json": "1",
        "nan.json": '{"candidates":[{"title":"A","average":NaN},{"title":"B"}]}',
        "nan_id.json": '{"list_id":NaN,"candidates":[{"title":"A"},{"title":"B"}]}',
        "half.json": '{"candidates":[{"title":"\\ud800"},{"title":"B"}]}',
        "digits.json": f'{{"candidates":[{{"title":"A","id":{"9" * 5000}}},{{"title":"B"}}]}}',
        "long.json": json.dumps({"candidates": [{"title": "x" * 2_000_000}, {"title": "B"}]}),
        "history.json": json.dumps({"history": [{"title": "x", "rating": 1}] * 5000} | LIST),
        "wide.jsonl": json.dumps(ROW).encode("utf-16"),
        "twice.jsonl": json.dumps(ROW)[:-1] + ',"chosen":"z"}',
        "deep.jsonl": f'{{"prompt":{deep}}}',
        "bad.jsonl": '{"prompt":1}',
        "escape.jsonl": json.dumps({ESC: 1}),
        "number.jsonl": "1",
        "empty.jsonl": "",
        "chosen.jsonl": json.dumps(ROW | {"rejected": ["b"]}),
        "rows.json": "null",
        "no.parquet": b"PAR1xxxx",
        "no.txt": "x",
        "wide.csv": (HEAD + "1,1,1,1\n").encode("utf-16"),
        "packed.csv": gzip.compress(b"x"),
        "no.csv.gz": "x",
        "cut.csv.gz": gzip.compress(HEAD.encode() * 999)[:40],
        "line.csv.gz": gzip.compress(HEAD.encode() + b"1" * (20 << 20)),
        "bomb.csv.gz": gzip.compress(HEAD.encode() + b"1,1,1,1\n" * (34 << 20), compresslevel=1),
        "negative.csv": HEAD + "".join(f"{u},{i},-1,{i}\n" for u in range(9) for i in range(30)),
        "nan.csv": HEAD + "1,1,nan,1\n",
        "inf.csv": HEAD + "1,1,inf,1\n",
        "text.csv": HEAD + f"1,1,{ESC}x,1\n",
        "head.csv": HEAD,
        "empty.csv": "",
        "columns.csv": "a,b\n1,2\n",
        "escape.csv": f"user_id{ESC},item\n1,2\n",
        "ragged.csv": HEAD + "1,2\n1,2,3,4,5\n",
        "quote.csv": HEAD + '"1,2,3,4\n',
        "time.csv": HEAD + f"1,1,1,{'9' * 20}\n",
        "dated.csv": HEAD + "1,1,1,2024-01-01\n",
        "fine.csv": HEAD + "".join(f"{u},{(u + 7 * i) % 50},{1 + i % 5},{i}\n" for u in range(20) for i in range(30)),
    }
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cases(command: str, table: str, before: str = "", after: str = "") -> list[tuple[str, list[str], str]]:
    """(command, words, what it is answered) of lines "words | answer"; the same words before and after all of them."""
    rows = []
    for line in table.strip().splitlines():
        words, _, answer = line.partition(" | ")
        found = [*before.split(), *words.replace("ESC", ESC).replace("NUL", "\0").split(), *after.split()]
        rows.append((command, found, answer.strip()))
    return rows


DRY = "--model_name_or_path base --data_dir data --dry_run true --disable_tqdm true"
FREE = "--duplicates drop --output_dir made"
CASES = [
    *cases("train", """
--optim adamw_bnb_8bit | --optim adamw_bnb_8bit cannot be used here:
--optim galore_adamw | --optim galore_adamw cannot be used here:
--optim apollo_adamw | --optim apollo_adamw cannot be used here:
--optim lomo | --optim lomo cannot be used here:
--optim grokadamw | --optim grokadamw cannot be used here:
--optim schedule_free_adamw | --optim schedule_free_adamw cannot be used here:
--optim adamw_torch_8bit | --optim adamw_torch_8bit cannot be used here:
--optim adamw_anyprecision | --optim adamw_anyprecision cannot be used here:
--optim stable_adamw | --optim stable_adamw cannot be used here:
--optim adamw_torch_npu_fused | --optim adamw_torch_npu_fused cannot be used here:
--optim paged_lion_8bit | --optim paged_lion_8bit cannot be used here:
--optim rmsprop_bnb | --optim rmsprop_bnb cannot be used here:
--optim lion | invalid choice: 'lion'
--optim sgd --optim_args momentum=x | --optim sgd with --optim_args momentum=x cannot be used here: could not convert
--optim_args nonsense | --optim_args nonsense cannot be used here:
--optim_args a=b | with --optim_args a=b cannot be used here: it reads none of them
--optim_target_modules q_proj | is read with an --optim of galore or apollo
--lr_scheduler_type nonsense | nonsense is not a valid SchedulerType
--lr_scheduler_type polynomial --max_steps 1 | polynomial cannot be used for 1 steps: 
--lr_scheduler_type warmup_stable_decay | cannot be used for
--lr_scheduler_type cosine_with_min_lr | cannot be used for
--lr_scheduler_type cosine_warmup_with_min_lr | cannot be used for
--lr_scheduler_type reduce_lr_on_plateau | requires an eval strategy
--lr_scheduler_type greedy | requires an eval strategy
--lr_scheduler_type greedy --eval_strategy epoch --metric_for_best_model x | --metric_for_best_model x is not measured
--lr_scheduler_kwargs {"nonsense":1} | --lr_scheduler_kwargs: nonsense is no setting of cosine
--lr_scheduler_kwargs {"num_cycles":"x"} | cannot be used for
--lr_scheduler_kwargs nonsense | expected a JSON object
--lr_scheduler_kwargs {"a":1,"a":2} | has the key 'a' twice
--lr_scheduler_kwargs {a:1} | --lr_scheduler_kwargs is not JSON
--lr_scheduler_type constant --lr_scheduler_kwargs {"a":1} | a is no setting of constant
--gradient_checkpointing_kwargs {"a":1} | a is no setting of it
--gradient_checkpointing_kwargs x | expected a JSON object
--accelerator_config nowhere | --accelerator_config nowhere: no such file
--accelerator_config {"a":1} | unexpected keyword argument 'a'
--fsdp full_shard | launch several with torchrun
--fsdp full_shard --fsdp_config nowhere | --fsdp_config nowhere: no such file
--deepspeed nowhere.json | --deepspeed nowhere.json: no such file
--save_strategy best | goes by evaluations; give --eval_strategy
--save_strategy best --eval_strategy epoch | needs --metric_for_best_model; expected one of loss,
--save_strategy best --eval_strategy epoch --metric_for_best_model x | --metric_for_best_model x is not measured
--load_best_model_at_end true --eval_strategy epoch --save_strategy epoch --metric_for_best_model x | is not measured
--load_best_model_at_end true --eval_strategy epoch --save_strategy steps | requires the save and eval strategy to match
--push_to_hub true --hub_model_id a/b/c | --hub_model_id a/b/c is no name of a repository
--report_to wandb | --report_to wandb is unknown, or not installed
--fp16 true --use_cpu true | --fp16 true needs a GPU, and this run has none
--debug nonsense | invalid DebugOption value
--tf32 true | --tf32 requires Ampere
--eval_strategy steps --eval_steps -1 | --eval_steps is -1
--eval_strategy steps --eval_steps 1.5 | --eval_steps must be an integer if bigger than 1
--logging_steps nan | --logging_steps is nan
--logging_steps 0 | requires non-zero --logging_steps
--save_strategy steps --save_steps 0 | --save_steps is 0
--save_total_limit 0 | --save_total_limit is 0; expected at least 1
--max_steps 99999999999999999999 | --max_steps is 1e+20
--num_train_epochs 1e300 | --num_train_epochs is 1e+300
--num_train_epochs nan | --num_train_epochs is nan
--learning_rate nan | --learning_rate is nan
--learning_rate x | invalid float value: 'x'
--max_grad_norm nan | --max_grad_norm is nan
--warmup_steps 1e300 | --warmup_steps is 1e+300
--tokens_per_batch 99999999999999999999 | --tokens_per_batch is 1e+20
--tokens_per_batch 1000000000000 | --tokens_per_batch is 1e+12
--tokens_per_batch 0 | --tokens_per_batch is 0
--tokens_per_batch 9 | more than --tokens_per_batch 9
--eval_tokens_per_batch -1 | --eval_tokens_per_batch is -1
--gradient_accumulation_steps 1000000000000 | --gradient_accumulation_steps is 1e+12
--lists_per_batch 0 | --lists_per_batch is 0
--seed 99999999999999999999 | --seed is 1e+20; expected at least 0, and below 4,294,967,296
--seed -1 | --seed is -1
--data_seed 4294967296 | --data_seed is 4294967296
--lora_r 1000000000 | --lora_r is 1000000000
--lora_target_modules nonsense | not found in the base model
--lora_target_modules .*((( | not found in the base model
--dataloader_num_workers 1000000 | --dataloader_num_workers is 1000000
--dataloader_prefetch_factor 3 | can only be set when data is loaded in a different process
--permutations 1000000000 | --permutations is 1000000000
--max_length 1 | max_length
--alpha nan | --alpha is nan
--beta inf | --beta is inf
--sigma 0 | --sigma is 0
--gamma -1 | --gamma is -1
--psl nonsense | --psl 'nonsense': expected one of
--max_train_lists 0 | --max_train_lists is 0
--objective nonsense | --objective 'nonsense' is unknown
--objective dmpo --num_negatives 100000000 | --num_negatives is 100000000
--objective dmpo --dpo_beta nan | --dpo_beta is nan
--objective dmpo --dmpo_variant nonsense | invalid choice: 'nonsense'
--stages nonsense | --stages names 'nonsense'
--stages sft,dmpo --stage_epochs 1 | has 1 values for 2 stages
--init_adapter nowhere | no adapter_config.json there
--init_adapter base | no adapter_config.json there
--template nowhere | no prompt template 'nowhere'
--template bad/bomb.yaml | holds more than 100,000 values
--template bad/deep.yaml | is nested deeper than 50 levels
--template bad/cycle.yaml | or refers to itself
--template bad/wide.yaml | UTF-16 text
--template bad/twice.yaml | has the key 'learning_rate' twice
--template bad/code.yaml | not valid YAML
--template bad/bomb.csv.gz | larger than 65,536 bytes
--template /dev/zero | larger than 65,536 bytes
--config nowhere | no such file or recipe
--config bad/deep.yaml | is nested deeper than 50 levels
--config bad/bomb.yaml | holds more than 100,000 values
--config bad/cycle.yaml | or refers to itself
--config bad/twice.yaml | has the key 'learning_rate' twice
--config bad/wide.yaml | UTF-16 text
--config bad/bytes.yaml | not UTF-8 text
--config bad/code.yaml | not valid YAML
--config bad/date.yaml | not valid YAML
--config bad/digits.yaml | not valid YAML
--config bad/list.yaml | learning_rate is a list
--config bad/number.yaml | is not a configuration
--config bad/null.yaml | holds a null character
--config bad/escape.yaml | unknown option '\\x1b[31mx'
--config bad/empty.yaml | is not a configuration
--config bad/tab.yaml | not valid YAML
--config bad/large.yaml | larger than 1,048,576 bytes
--config bad/bomb.csv.gz | larger than 1,048,576 bytes
--config /dev/zero | larger than 1,048,576 bytes
--config data | no such file or recipe
--config demo --config demo | is given 2 times
--output_dir lists.json | lists.json is a file
--output_dir data | holds something else than a run of alro_fast
--output_dir /proc/x | cannot be written
--output_dir aNULb | holds a null character
--resume_from_checkpoint nowhere | no such folder
--resume_from_checkpoint true --output_dir never | no whole checkpoint in never
--learning-rate= | 
--nonsense 1 | unknown option '--nonsense'
nonsense | unknown option 'nonsense'
ESC | unknown option '\\x1b[31m'
--help nonsense | is no group of options
""", before=DRY),
    *cases("train", """
--data_dir nowhere | is not a prepared data folder
--data_dir lists.json | is not a prepared data folder
--model_name_or_path lists.json --data_dir data | no tokenizer could be loaded
--model_name_or_path data --data_dir data | no tokenizer could be loaded
--model_name_or_path a/b/c --data_dir data | no tokenizer could be loaded
--preferences bad/wide.jsonl --objective dmpo --model_name_or_path base | UTF-16 text
--preferences bad/deep.jsonl --objective dmpo --model_name_or_path base | nested too deeply
--preferences bad/twice.jsonl --objective dmpo --model_name_or_path base | has the key 'chosen' twice
--preferences nowhere.json --objective dmpo --model_name_or_path base | no preference file
--model_name_or_path scratch --use_peft false --scratch_hidden_size 1000000000 | --scratch_hidden_size is 1000000000
--model_name_or_path scratch --use_peft false --scratch_layers 1000000000 | --scratch_layers is 1000000000
--model_name_or_path scratch --use_peft false --scratch_vocab_size 0 | --scratch_vocab_size is 0
--dataset ml-1m --raw_dir nowhere | is not a folder
--dataset ml-1m --raw_dir bad | lacks ratings.dat and movies.dat
--dataset ml-1m | needs --raw_dir
--dataset csv | is any table; prepare it first
""", after="--dry_run true --disable_tqdm true"),
    *cases("rank", """
nowhere.json | no such file
data | is a folder
--lists nowhere | is not a prepared data folder
lists.json --lists data | leave one out
bad/deep.json | nested too deeply
bad/deep_in.json | nested too deeply
bad/wide.json | UTF-16 text
bad/bytes.json | not UTF-8 text
bad/bomb.csv.gz | packed by gzip
bad/twice.json | has the key 'candidates' twice
bad/twice_in.json | has the key 'title' twice
bad/escape.json | unknown key '\\x1b[31m'
bad/long_key.json | xxx; expected some of list_id
bad/long_id.json | xxx; give every candidate once
bad/same.json | have the same id '\\x1b[31m'
bad/empty.json | is empty
bad/null.json | found nothing
bad/number.json | found a number
bad/nan.json | found nan
bad/nan_id.json | "list_id" is nan
bad/half.json | is half a character
bad/digits.json | thousands of digits
bad/long.json | longer than 10,000 characters
bad/history.json | shorten its history
/dev/zero | more than 64 million characters
/dev/null | is empty
lists.json --shuffles 100000000000 | shuffles is at most 10,000
lists.json --shuffles 0 | shuffles is at least 1
lists.json --shuffles x | invalid int value
lists.json --method beam --beams 1000000000000 | beams is at most 1,000
lists.json --method beam --beams 0 | beams is at least 1
lists.json --method nonsense | unknown method
lists.json --shuffles 2 --seed -1 | seed is at least 0
lists.json --shuffles 2 --seed 99999999999999999999 | seed is below 4,294,967,296
lists.json --shuffles 2 --merge nonsense | unknown merge
lists.json --token_budget -1 | token_budget is at least 0
lists.json --token_budget 99999999999999999999 | token_budget is below
lists.json --top_k 0 | --top_k is at least 1
lists.json --device nonsense | nonsense
lists.json --device cuda:99 | cuda
lists.json --base_model lists.json | lists.json
lists.json --fuse --adapter ratings | 
lists.json --nonsense | unrecognized arguments
lists.json ESC | unrecognized arguments: \\x1b[31m
lists.json --on_error x | expected one of stop, skip
aNULb | holds a null character
--lists data --limit 0 | --limit is at least 1
--lists data --split nonsense | expected train, valid or test
lists.json --adapter nowhere | no such folder
lists.json --adapter lists.json | no such folder
lists.json --adapter data | data
lists.json --adapter ESC | \\x1b[31m: no such folder
lists.json --adapter titles | titles
lists.json --adapter tasks --hybrid grade=nan | grade
lists.json --adapter tasks --hybrid nonsense | nonsense
""", before="--adapter run"),
    *cases("evaluate", """
--lists nowhere | is not a prepared data folder
--lists data --split nonsense | nonsense
--lists data --split ESC | \\x1b[31m
--lists data --limit -1 | --limit is at least 1
--lists data --bootstrap -1 | --bootstrap is at least 0
--lists data --bootstrap 100000000000000 | --bootstrap is at most 100,000
--lists data --baselines nonsense | expected one of cheap, all, none
--lists data --gain nonsense | unknown gain
--lists data --output_dir lists.json | lists.json is a file
--lists data --output_dir data | which no evaluation wrote
--lists data --output_dir /proc/x | cannot be written
--lists data --shuffles 100000000000 | shuffles is at most 10,000
--lists data --template movies | is no option of
--preferences nowhere.json | no preference file
--preferences bad/wide.jsonl | UTF-16 text
--preferences bad/twice.jsonl | has the key 'chosen' twice
--preferences bad/deep.jsonl | nested too deeply
--preferences bad/bad.jsonl | expected columns prompt, chosen, rejected
--preferences bad/escape.jsonl | \\x1b[31m
--preferences bad/number.jsonl | is no list of rows
--preferences bad/empty.jsonl | holds no rows
--preferences bad/rows.json | is no list of rows
--preferences bad/chosen.jsonl | 
--preferences bad/no.parquet | is no Parquet file
--preferences bad/no.txt | cannot read .txt
--preferences data | no preference file
 | nothing to measure on
""", before="--adapter run"),
    *cases("evaluate", """
--template nowhere | no prompt template 'nowhere'
--template bad/deep.yaml | is nested deeper than 50 levels
--template bad/bomb.yaml | holds more than 100,000 values
--template bad/wide.yaml | UTF-16 text
--template bad/escape.yaml | \\x1b[31mx
--template data | no prompt template 'data'
--identifiers nonsense | invalid choice
--answer nonsense | invalid choice
--adapter run | two things
""", before="--model_name_or_path base --lists data"),
    *cases("client", """
--url nonsense | is no address
--url file:///etc/passwd | is no address
--url ftp://localhost/ | is no address
--url http://127.0.0.1:99999 | is no address
--url http://[::1 | is no address
--url http://ESC/ | is no address
--url http://127.0.0.1:9 | cannot be reached
--url http://me:secret@127.0.0.1:9 | --url holds a name or a password
--parallel 100000000000 | parallel is at most 1024
--parallel 0 | parallel is above 0
--timeout nan | timeout is above 0
--timeout 1e300 | timeout
--timeout -1 | timeout is above 0
--api_key é | the API key holds a character that no header has
--shuffles 1000000000 | shuffles is at most 10,000
--adapter nowhere | no such folder
--adapter titles | answers that are titles
--adapter tasks | three tasks of recranker
--adapter ratings | answer with grades
--adapter data | data
""", before="--adapter run --model tuned lists.json"),
    *cases("prepare", """
nowhere.csv | is not a file
data | has no file that ends in .csv
'nowhere/*.csv' | has no file that ends in .csv
bad/fine.csv --partitions 0 | expected 1 to 10,000
bad/fine.csv --partitions 2 --signals average | is no option of partitioned lists
bad/bomb.csv.gz | unfolds to more than
bad/line.csv.gz | has a line of more than
bad/no.csv.gz | is not an intact gzip file
bad/cut.csv.gz | gzip file
bad/packed.csv | packed by gzip
bad/wide.csv | UTF-16 text
bad/negative.csv | has a negative rating
bad/nan.csv | NaN or infinite
bad/inf.csv | NaN or infinite
bad/text.csv | not a number
bad/head.csv | 
bad/empty.csv | is empty
bad/columns.csv | has no column
bad/escape.csv | has no column
bad/ragged.csv | cannot be read
bad/quote.csv | 
bad/time.csv | timestamp
bad/dated.csv | timestamp
bad/no.parquet | does not look like csv
bad/fine.csv --output_dir lists.json | lists.json is a file
bad/fine.csv --output_dir run | holds something else
bad/fine.csv --list_size 1 | --list_size 1 is too small
bad/fine.csv --list_size 999999999999999999999 | is too large
bad/fine.csv --list_size 2000000000 | no user has
bad/fine.csv --history_length 999999999999999999999 | is too large
bad/fine.csv --negatives 999999999 | is too many
bad/fine.csv --test_lists 2000000000 | is too large
bad/fine.csv --seed -1 | --seed -1 is too small
bad/fine.csv --seed 99999999999999999999 | is too large
bad/fine.csv --signals nonsense | --signals nonsense: expected some of
bad/fine.csv --signals average --signal_folds 1000000000 | is too large
bad/fine.csv --k_core 1 | is too small
bad/fine.csv --k_core 1000000 | leaves nothing of
bad/fine.csv --duplicates nonsense | invalid choice
bad/fine.csv --separator ab | is not one ASCII character
bad/fine.csv --user_column ESC | has no column '\\x1b[31m'
bad/fine.csv --items_file nowhere | is not a file
bad/fine.csv --nonsense 1 | unrecognized arguments
""", before=f"--dataset csv {FREE} --ratings_file"),
    *cases("prepare", """
--dataset nonsense | invalid choice
--dataset csv | needs --ratings_file
--dataset parquet --ratings_file bad/no.parquet | cannot be read
--dataset ml-1m --raw_dir nowhere | is not a folder
--dataset ml-1m --raw_dir bad | lacks ratings.dat and movies.dat
--dataset ml-latest-small | --accept_licence
--dataset book-crossing --raw_dir bad | lacks
""", after="--output_dir made"),
    *cases("first_stage", """
--retriever nonsense | invalid choice: 'nonsense'
--like nan | is not below --like nan
--num_candidates 1000000000 | is too large
--num_samples 100000000000 | is too large
--folds 1000000000 | is too large
--factors 1000000000 | is too large
--factors -1 | expected a number above 0
--iterations 1000000000000 | is too large
--retriever bpr --learning_rate nan | expected a number above 0
--retriever lightgcn --layers 1000000000 | is too large
--sampling nonsense | --sampling 'nonsense': expected some of
--seed 99999999999999999 | is too large
--output_dir run | holds something else
""", before=f"--dataset csv --ratings_file bad/fine.csv {FREE}"),
    *cases("report", """
nowhere | nowhere
lists.json | is a file
data | data
run | run
bad | bad
run --run nowhere | holds no trainer_state.json or config.yaml
 | required: folder
"""),
    *cases("study", """
nowhere | no such file or study
data | no such file or study
bad/deep.yaml | is nested deeper than 50 levels
bad/bomb.yaml | holds more than 100,000 values
bad/wide.yaml | UTF-16 text
bad/twice.yaml | has the key 'learning_rate' twice
bad/code.yaml | not valid YAML
bad/bytes.yaml | not UTF-8 text
bad/escape.yaml | unknown key '\\x1b[31mx'
bad/empty.yaml | is no study
/dev/zero | larger than 1,048,576 bytes
alro-parts --seeds 0-99999999999 | expected at most 1,000 numbers
alro-parts --seeds 0-999999999999999999999999999 | expected at most 1,000 numbers
alro-parts --seeds x | expected numbers such as 0-4
alro-parts --processes 0 | --processes is at least 1
alro-parts --set nonsense | expected option=value
alro-parts --set nonsense=1 | nonsense
alro-parts --set learning_rate=[1 | is not valid YAML
alro-parts --set hub_token=x | a study writes its options down
alro-parts --set seed=1 | seed is the study's own
alro-parts --output_dir lists.json | lists.json is a file
alro-parts --output_dir run | holds something else than a study
""", after="--dry_run"),
]  # fmt: skip
