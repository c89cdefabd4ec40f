// huggingface.h: model directories: config.json and weights, ours and Hugging Face's.

// Adds the tensors of a block of parameters, a layer each, under their names with a prefix.
static void tensors_add_params(Tensors *t, const Model *m, const Params *p, const char *prefix) {
    for (size_t k = 0; k < PARAM_COUNT; k++) {
        const Spec *s = &m->specs[k];
        int stacked = strstr(s->key, "%zu") != NULL;
        size_t layers = stacked ? s->shape[0] : 1, size = layers ? s->count/layers : 0;
        for (size_t l = 0; l < layers && s->count; l++) {
            const char *name = stacked ? str(s->key, l) : s->key;
            tensors_add(t, str("%s%s", prefix, name), s->rank - (size_t)stacked,
                        s->shape + stacked, ((real *const *)p)[k] + l*size);
        }
    }
}

// Sizes from config.json. A key that is missing has the value that Hugging Face's class gives it.
static void read_config(const char *dir, Dims *d) {
    char *path = strdup(str("%s/config.json", dir));
    CHECK(exists(dir), "%s: no such directory", dir);
    CHECK(exists(path), "%s: no config.json; expected a model directory", dir);
    Bytes b = read_file(path);
    Json *c = json_parse(path, b.data, b.size);
    json_expect(c, JSON_OBJECT, path, "config");
    CHECK(!json_get(c, "ssm_cfg"), "%s is in the official format; convert it first: "
          "dev/data/README.md", path);
    const char *type = json_string(c, path, "model_type", "nothing");
    CHECK(!strcmp(type, "mamba2") || !strcmp(type, "mamba2_mlp"), "%s: model_type is %s; expected "
          "mamba2", path, type);
    const char *act = json_string(c, path, "hidden_act", "silu");
    CHECK(!strcmp(act, "silu") || !strcmp(act, "swish"), "%s: hidden_act is %s; only silu is "
          "supported", path, act);
    CHECK(!json_bool(c, path, "use_bias", 0), "%s: use_bias is true; linear layers with a bias are "
          "not supported", path);
    CHECK(json_bool(c, path, "use_conv_bias", 1), "%s: use_conv_bias is false; a convolution "
          "without a bias is not supported", path);
    CHECK(json_bool(c, path, "rms_norm", 1), "%s: rms_norm is false; only RMSNorm is supported",
          path);
    memset(d, 0, sizeof *d);
    struct { const char *key; size_t *size, fallback; } keys[] = {
        { "hidden_size", &d->M, 4096 }, { "num_hidden_layers", &d->L, 64 },
        { "num_heads", &d->H, 128 }, { "head_dim", &d->P, 64 }, { "state_size", &d->N, 128 },
        { "n_groups", &d->G, 8 }, { "conv_kernel", &d->W, 4 }, { "vocab_size", &d->V, 32768 },
        { "d_intermediate", &d->F, 0 },
    };
    for (size_t i = 0; i < sizeof keys/sizeof *keys; i++) {
        const Json *v = json_get(c, keys[i].key);
        *keys[i].size = v ? json_size(v, path, keys[i].key) : keys[i].fallback;
        CHECK((*keys[i].size > 0 || i == 8) && *keys[i].size < 1u << 30, "%s: %s is %zu", path,
              keys[i].key, *keys[i].size);
    }
    CHECK(d->W <= MAX_CONV, "%s: conv_kernel is %zu, at most %d is supported", path, d->W,
          MAX_CONV);
    double expand = json_number(c, path, "expand", 2);
    CHECK(expand == floor(expand), "%s: expand is %g, expected a whole number", path, expand);
    d->E = mul(d->H, d->P);
    CHECK((double)d->E == expand*(double)d->M, "%s: num_heads * head_dim = %zu, expected expand * "
          "hidden_size = %g", path, d->E, expand*(double)d->M);
    d->tied = json_bool(c, path, "tie_word_embeddings", 0);
    d->eps = json_number(c, path, "layer_norm_epsilon", 1e-5);
    d->dt_lo = 0, d->dt_hi = INFINITY;
    const Json *limit = json_get(c, "time_step_limit");
    if (limit && limit->kind == JSON_ARRAY && limit->span > 2) {
        const Json *low = limit + 1, *high = low + low->span;
        d->dt_lo = json_double(low, path, "time_step_limit");
        d->dt_hi = json_double(high, path, "time_step_limit");
    }
    d->vocab = d->V;
    json_free(c), free(b.data), free(path);
}

static void put_config(Text *t, const Dims *d, int eot) {
    put(t, "{\n  \"architectures\": [\"%s\"],\n  \"model_type\": \"%s\",\n",
        d->F ? "Mamba2MLPForCausalLM" : "Mamba2ForCausalLM", d->F ? "mamba2_mlp" : "mamba2");
    put(t, "  \"vocab_size\": %zu,\n  \"hidden_size\": %zu,\n  \"num_hidden_layers\": %zu,\n  "
        "\"state_size\": %zu,\n  \"expand\": %zu,\n  \"head_dim\": %zu,\n  \"num_heads\": %zu,\n  "
        "\"n_groups\": %zu,\n  \"conv_kernel\": %zu,\n  \"chunk_size\": %zu,\n",
        d->V, d->M, d->L, d->N, d->E/d->M, d->P, d->H, d->G, d->W, d->Q);
    if (d->F) put(t, "  \"d_intermediate\": %zu,\n", d->F);
    if (d->dt_lo > 0 || d->dt_hi < INFINITY)                 // a bare Infinity is not JSON
        put(t, "  \"time_step_limit\": [%#.17g, %#.17g],\n", d->dt_lo,
            d->dt_hi < INFINITY ? d->dt_hi : 3.4028234663852886e38);
    put(t, "  \"hidden_act\": \"silu\",\n  \"use_bias\": false,\n  \"use_conv_bias\": true,\n  "
        "\"rms_norm\": true,\n  \"residual_in_fp32\": true,\n  \"layer_norm_epsilon\": %#.17g,\n  "
        "\"tie_word_embeddings\": %s,\n", d->eps, d->tied ? "true" : "false");
    if (eot >= 0) put(t, "  \"bos_token_id\": %d,\n  \"eos_token_id\": %d,\n  \"pad_token_id\": "
                      "%d,\n",
                      eot, eot, eot);
    put(t, "  \"torch_dtype\": \"float%zu\"\n}\n", 8*sizeof(real));
}

// Reads the tensors of `want` from the files of a model directory; every one must be there.
static void read_tensors(const char *dir, const char *name, Tensors *want, const char *ignore) {
    char *path = strdup(str("%s/%s", dir, name));
    TensorFile f = tensor_file_open(path);
    int told = 0;
    JSON_EACH(key, f.header) {
        const char *found = key->text;
        if (!strcmp(found, "__metadata__") || (ignore && !strcmp(found, ignore))) continue;
        if (!strcmp(found, "backbone.embedding.weight")) found = "backbone.embeddings.weight";
        size_t i = 0;
        while (i < want->count && strcmp(want->list[i].name, found)) i++;
        CHECK(i < want->count, "%s: %s has no place in this model; config.json and the file do not "
              "belong together", path, found);
        CHECK(want->list[i].data, "%s: %s was read before", path, found);
        if (!told++ && sizeof(real) == 4 && !strcmp(json_string(key + 1, path, "dtype", ""), "F64"))
            fprintf(stderr, "notice: %s is float64; it is rounded to float32\n", path);
        tensor_read(&f, key + 1, &want->list[i]);
        want->list[i].data = NULL;                           // done
    }
    tensor_file_close(&f);
    free(path);
}

static void check_all_read(const char *dir, const Tensors *want) {
    for (size_t i = 0; i < want->count; i++)
        CHECK(!want->list[i].data, "%s: the tensor %s is missing", dir, want->list[i].name);
}

// The weights of a model directory, from one file or from those that an index names.
static void read_weights(const char *dir, Model *m) {
    Tensors want = { NULL, 0, 0 };
    const char *ignore = m->d.tied ? "lm_head.weight" : NULL;
    char *index = strdup(str("%s/model.safetensors.index.json", dir));
    tensors_add_params(&want, m, &m->w, "");
    if (!exists(index)) {
        CHECK(exists(str("%s/model.safetensors", dir)), "%s: no model.safetensors%s", dir,
              exists(str("%s/pytorch_model.bin", dir)) ? "; pytorch_model.bin is not read: save it "
              "with save_pretrained(..., safe_serialization=True)" : "");
        read_tensors(dir, "model.safetensors", &want, ignore);
    } else {
        Bytes b = read_file(index);
        Json *json = json_parse(index, b.data, b.size);
        const Json *map = json_expect(json_get(json, "weight_map"), JSON_OBJECT, index,
                                      "weight_map");
        const char **done = (const char **)alloc(map->span, sizeof(char *));
        size_t count = 0;
        JSON_EACH(key, map) {
            const char *file = json_expect(key + 1, JSON_STRING, index, key->text)->text;
            size_t i = 0;
            while (i < count && strcmp(done[i], file)) i++;
            if (i < count) continue;
            CHECK(!strchr(file, '/'), "%s: the file name %s has a slash", index, file);
            read_tensors(dir, file, &want, ignore);
            done[count++] = file;
        }
        free(done), json_free(json), free(b.data);
    }
    check_all_read(dir, &want);
    free(want.list), free(index);
}
