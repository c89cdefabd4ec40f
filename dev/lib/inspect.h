// inspect.h: --dump and --compare, every tensor of one micro-batch.

typedef struct { Model *m; Tensors list; } Dump;

static void dump_tensor(Dump *dump, const char *name, size_t rank, const size_t *shape,
                        const real *data) {
    size_t count = 1;
    for (size_t i = 0; i < rank; i++) count *= shape[i];
    if (!count) return;
    real *copy = alloc_reals(count);
    memcpy(copy, data, count*sizeof(real));
    tensors_add(&dump->list, name, rank, shape, copy);
}

// Called after each part of a layer: 0 its forward, 1 and 2 the two halves of its backward. A row
// of ACTS belongs to the part after which it holds what its name says.
static void dump_layer(void *watcher, size_t l, int part) {
    Dump *dump = (Dump *)watcher;
    const Model *m = dump->m;
    Acts a = layer_acts(m, l);
    const size_t n_M[] = { m->d.n, m->d.M };
    if (l == m->d.L) {
        dump_tensor(dump, part == 1 ? "grad.act.hidden" : "grad.act.resid", 2, n_M,
                    part == 1 ? a.g_u : a.g_resid);
        return;
    }
    if (part == 0) dump_tensor(dump, str("act.layers.%zu.resid", l), 2, n_M, a.resid);
    for (size_t i = 0; i < ACT_COUNT; i++) {
        const Spec *s = &m->act_specs[i];
        const real *data = ((real *const *)&a)[i];
        int late = !strcmp(s->name, "g_zxBCdt") || !strcmp(s->name, "g_u")
                || !strcmp(s->name, "g_resid");
        if (part == 0 && s->shape_text[1] == 'K' && s->count && strcmp(s->name, "states"))
            dump_tensor(dump, str("act.layers.%zu.%s", l, s->name), s->rank - 1, s->shape + 1,
                        data);
        if (part > 0 && !strncmp(s->name, "g_", 2) && strcmp(s->name, "g_states")
            && late == (part == 2))
            dump_tensor(dump, str("grad.act.layers.%zu.%s", l, s->name + 2), s->rank, s->shape,
                        data);
    }
}

static void dump_run(Run *run, Dump *dump) {
    Model *m = &run->m;
    const Dims *d = &m->d;
    const size_t n[] = { d->n, 1 }, n_M[] = { d->n, d->M }, n_V[] = { d->n, d->V }, one[] = { 1 };
    memset(dump, 0, sizeof *dump);
    dump->m = m;
    loader_next(&run->train);
    set_batch(m, &run->train, 1);
    m->all_logits = alloc_reals(mul(d->n, d->V));
    m->watch = dump_layer, m->watcher = dump;
    model_zero_grad(m);
    real loss = (real)run->device->loss(m, 1);
    run->device->fetch(m);
    dump_tensor(dump, "act.hidden", 2, n_M, m->a.hidden);
    dump_tensor(dump, "logits", 2, n_V, m->all_logits);
    dump_tensor(dump, "losses", 1, n, m->a.losses);
    dump_tensor(dump, "loss", 1, one, &loss);
    tensors_add_params(&dump->list, m, &m->g, "grad.");
    tensors_add_params(&dump->list, m, &m->w, "");
    free(m->all_logits);
    m->all_logits = NULL;
}

typedef struct { double most, relative; } Difference;

// The largest difference, and the root mean square of the differences over that of ref
static Difference difference(const double *x, const double *ref, size_t count) {
    double square = 0, size = 0, most = 0;
    for (size_t i = 0; i < count; i++) {
        double e = x[i] - ref[i];
        if (isnan(e) || fabs(e) > most) most = fabs(e);      // a NaN stays: nothing is above it
        square += e*e, size += ref[i]*ref[i];
    }
    Difference d = { most, square == 0 ? 0 : sqrt(square/size) };
    return d;
}

// The values of tensor x, ours (no file) or those of its namesake in a dump
static double *values_of(const Tensor *x, const TensorFile *dump) {
    double *v = (double *)alloc(x->count, sizeof(double));
    if (!dump) {
        for (size_t i = 0; i < x->count; i++) v[i] = (double)x->data[i];
        return v;
    }
    const Json *entry = json_get(dump->header, x->name);
    CHECK(entry, "%s: no tensor %s; the dumps are of different models or programs", dump->path,
          x->name);
    tensor_doubles(dump, entry, x, v);
    return v;
}

// The largest relative error that rounding explains: twice BASE's and a little, or without BASE a
// thousand times epsilon; in bf16, whose products have 8 bits, a few units of its last place.
static double error_bound(const char *name, double epsilon, double base) {
    int sum = strstr(name, "dt") || strstr(name, "A_log") || strstr(name, "mixer.D");
    if (!strcmp(flags.dtype, "bf16")) return (sum ? 8 : 4)/256.0;
    return base < 0 ? 1000*epsilon : 2*base + 16*epsilon;
}

// Prints a line for each tensor, in network order; returns how many differ by more than that.
static int compare_dump(Run *run) {
    Dump dump;
    int bad = 0;
    char *ref_path = strdup(flags.compare), *base_path = strchr(ref_path, ',');
    if (base_path) *base_path++ = 0;
    TensorFile ref = tensor_file_open(ref_path), base = ref;
    if (base_path) base = tensor_file_open(base_path);
    dump_run(run, &dump);
    const char *dtype = json_string(json_get(ref.header, "loss"), ref_path, "dtype", "F32");
    double epsilon = sizeof(real) == 4 || !strcmp(dtype, "F32") ? FLT_EPSILON : DBL_EPSILON;
    printf("%-44s %-16s %10s %10s%s\n", "tensor", "shape", "largest", "relative",
           base_path ? "       base  ratio" : "");
    for (size_t i = 0; i < dump.list.count; i++) {
        const Tensor *x = &dump.list.list[i];
        Text shape = { NULL, 0, 0 };
        double *ours = values_of(x, NULL), *theirs = values_of(x, &ref);
        Difference d = difference(ours, theirs, x->count), b = { 0, -1 };
        if (base_path) {
            double *third = values_of(x, &base);
            b = difference(third, theirs, x->count);
            free(third);
        }
        put(&shape, "%s", "");
        for (size_t k = 0; k < x->rank; k++) put(&shape, "%s%zu", k ? "," : "", x->shape[k]);
        int good = d.relative <= error_bound(x->name, epsilon, b.relative);
        printf("%-44s %-16s %10.2e %10.2e", x->name, shape.data, d.most, d.relative);
        if (base_path) printf(" %10.2e %6.2f", b.relative, b.relative > 0 ? d.relative/b.relative
                              : 0);
        printf("%s\n", good ? "" : bad ? "  FAIL" : "  FAIL, first divergence");
        bad += !good;
        free(shape.data), free(ours), free(theirs);
    }
    printf("%zu tensors compared, %d differ\n", dump.list.count, bad);
    return bad;
}

// ---- multiple choice: the evaluation files of llm.c ---------------------------------------------
// 256 int32 (20240522, 1, examples, longest example), then 16-bit numbers, for each example:
// 65535, bytes, index, label, choices, context size, the context, and for each choice its size and
// its tokens. A choice's score is the log-likelihood of its tokens; acc takes the best sum,
// acc_norm the best mean over the tokens (llm.c's rule).

static int is_task_file(const char *path) {
    int32_t magic = 0;
    gzFile f = gzopen(path, "rb");
    int known = f && gzread(f, &magic, 4) == 4 && magic == 20240522;
    if (f) gzclose(f);
    return known;
}

// The sum of the log-likelihoods of the last `count` tokens of ids (size)
static double log_likelihood(Run *run, const int *ids, size_t size, size_t count) {
    Model *m = &run->m;
    double sum = 0;
    dims_batch(&m->d, 1, size - 1);
    m->ids = ids, m->targets = ids + 1, m->doc = NULL, m->scale = 1;
    run->device->loss(m, 0);
    for (size_t i = size - 1 - count; i < size - 1; i++) sum -= (double)m->a.losses[i];
    return sum;
}

// The 16-bit numbers of a file, read with a check of the end
typedef struct { const char *path; const uint16_t *at, *end; } Words;
static size_t next_word(Words *w) {
    CHECK(w->at < w->end, "%s ends in the middle of an example", w->path);
    return *w->at++;
}

static int eval_tasks(Run *run) {
    Bytes b = read_file(flags.eval);
    const int32_t *header = (const int32_t *)(const void *)b.data;
    CHECK(b.size >= 1024 && header[1] == 1 && header[2] > 0,
          "%s: no header of an evaluation file with examples", flags.eval);
    Words w = { flags.eval, (const uint16_t *)(const void *)(b.data + 1024), NULL };
    w.end = w.at + (b.size - 1024)/2;
    enum { LONGEST = 4096 };
    weights_open(run, 1, LONGEST);
    int *ids = (int *)alloc(LONGEST + 1, sizeof(int));
    size_t right = 0, right_norm = 0, examples = 0;
    for (; examples < (size_t)header[2]; examples++) {
        double best = -INFINITY, best_norm = -INFINITY;
        size_t choice = 0, choice_norm = 0;
        CHECK(next_word(&w) == 65535, "%s: example %zu does not begin with 65535", w.path,
              examples);
        next_word(&w), next_word(&w);
        size_t label = next_word(&w), choices = next_word(&w), context = next_word(&w);
        CHECK(context > 0 && context < LONGEST, "%s: example %zu has a context of %zu tokens",
              w.path, examples, context);
        for (size_t i = 0; i < context; i++) ids[i] = (int)next_word(&w);
        for (size_t c = 0; c < choices; c++) {
            size_t size = next_word(&w);
            CHECK(size > 0 && context + size <= LONGEST, "%s: example %zu has a choice of %zu "
                  "tokens", w.path, examples, size);
            for (size_t i = 0; i < size; i++) ids[context + i] = (int)next_word(&w);
            for (size_t i = 0; i < context + size; i++)
                CHECK((size_t)ids[i] < run->m.d.V, "%s: token %d is outside the vocabulary of %zu",
                      w.path, ids[i], run->m.d.V);
            double score = log_likelihood(run, ids, context + size, size),
            norm = score/(double)size;
            if (score > best) best = score, choice = c;
            if (norm > best_norm) best_norm = norm, choice_norm = c;
        }
        right += choice == label, right_norm += choice_norm == label;
    }
    printf("%s: %zu examples, acc %.4f, acc_norm %.4f\n", flags.eval, examples,
           (double)right/(double)examples, (double)right_norm/(double)examples);
    return 0;
}
