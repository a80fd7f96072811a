"""The task that a config's `objective` names, for train.py. To add one is to add a file and a case here."""

from model import GPTConfig
from runs.start import Start
from tasks.classify import classify_task
from tasks.masked import masked_task
from tasks.pretrain import choose_tokenizer, open_corpus, pretraining_task, summary
from tasks.task import Task, check_model
from tasks.translate import load_translations, translation_task
from training.config import TrainConfig


def open_task(start: Start, config: TrainConfig, model_config: GPTConfig) -> tuple[Task, str]:
    """Return the task, on the data set that the config names, and a line about that data.

    Sets model_config.vocab_size if it was 0. Raises ValueError for data that is missing, damaged, or does not suit the
    model, or the run that it starts from.
    """
    check_model(config.objective, model_config)
    if config.objective == "classify":
        return classify_task(start, config, model_config)
    known = start.resumes or start.source
    if config.objective == "translate":
        data = load_translations(config.dataset, model_config.block_size)
        choose_tokenizer(data.pairs, known, config.objective, model_config)
        return translation_task(data, config, model_config), data.summary()
    corpus = open_corpus(config.dataset)
    tokenizer = choose_tokenizer(corpus, known, config.objective, model_config)
    make_task = masked_task if config.objective == "masked" else pretraining_task
    return make_task(corpus, tokenizer, config, model_config), summary(corpus)
