// flags.h: reads the command line by the table of flags, and prints --help from it.

static const char *flag_name(size_t i) {                     // --d-model
    const char *s = str("--%s", flag_specs[i].name);
    for (char *c = (char *)s; *c; c++) if (*c == '_') *c = '-';
    return s;
}

// Gives flag i a value as text; "" is the value of a flag that is decided later.
static void flag_set(size_t i, const char *text) {
    const FlagSpec *s = &flag_specs[i];
    char *field = (char *)&flags + s->offset, *end = NULL;
    if (!strcmp(s->type, "Str") || !strcmp(s->type, "Opt")) {
        *(Str *)field = text;
        return;
    }
    double value = *text ? strtod(text, &end) : 0;
    int whole = s->type[0] != 'N';
    if (*text) {
        if (whole) strtoll(text, &end, 10);
        if (*end || isspace((unsigned char)*text) || !(value >= s->least && value <= s->most))
            die_usage("%s %s: expected %s from %.15g to %.15g", flag_name(i), text,
                      whole ? "a whole number" : "a number", s->least, s->most);
    }
    if (!whole) *(Num *)field = value;
    else *(Int *)field = *text ? strtoll(text, &end, 10) : 0;
}

static void flags_default(void) {
    for (size_t i = 0; i < FLAG_COUNT; i++) flag_set(i, flag_specs[i].text);
    flags.compare = NULL;
}

static void print_help(void) {
    const char *group = "";
    printf("Trains Mamba-2 language models, and generates text with them. For example\n\n"
           "    %s --data 'data/*.txt' --model small --steps 2000 --out out\n"
           "    %s --out out --generate 200 --prompt 'ROMEO:'\n\n"
           "Without a flag it trains a small model on Shakespeare. A flag is --name value or "
           "--name=value.\n", program, program);
    for (size_t i = 0; i < FLAG_COUNT; i++) {
        const FlagSpec *s = &flag_specs[i];
        if (strcmp(group, s->group)) printf("\n%s\n", group = s->group);
        const char *value = !strcmp(s->type, "Switch") ? ""
                          : !strcmp(s->type, "Opt") ? "[REF[,BASE]]"
                          : s->type[0] == 'I' ? "N" : s->type[0] == 'N' ? "X" : "S";
        printf("  %-24s ", str("%s %s", flag_name(i), value));
        if (!strcmp(s->help, "a preset: PRESETS")) {
            printf("a preset:");
            for (size_t k = 0; k < PRESET_COUNT; k++) printf(" %s", presets[k].name);
        } else printf("%s", s->help);
        printf(*s->text ? " (%s)\n" : "\n", s->text);
    }
}

// Characters that a word on the command line has in common with the name of flag i
static size_t common_prefix(size_t i, const char *word) {
    const char *name = flag_name(i);
    size_t n = 0;
    while (word[n] && word[n] == name[n]) n++;
    return n;
}

static size_t find_flag(const char *word) {
    size_t size = strcspn(word, "="), best = 0, most = 0;
    for (size_t i = 0; i < FLAG_COUNT; i++) {
        size_t n = common_prefix(i, word);
        if (n == size && strlen(flag_specs[i].name) + 2 == size) return i;
        if (n > most) best = i, most = n;
    }
    die_usage("unknown flag %.*s%s", (int)size, word,
              most > 3 ? str("; did you mean %s?", flag_name(best)) : "; see --help");
}

static void flags_parse(int argc, char **argv) {
    flags_default();
    for (int a = 1; a < argc; a++) {
        size_t i = find_flag(argv[a]);
        const char *type = flag_specs[i].type, *value = strchr(argv[a], '=');
        if (value) value++;
        if (!value && !strcmp(type, "Switch")) value = "1";
        else if (!value && !strcmp(type, "Opt"))
            value = a + 1 < argc && strncmp(argv[a + 1], "--", 2) ? argv[++a] : "";
        else if (!value) {
            if (a + 1 == argc || !strncmp(argv[a + 1], "--", 2))
                die_usage("%s needs a value", flag_name(i));
            value = argv[++a];
        }
        if (!*value && i != FLAG_prompt && strcmp(type, "Opt"))
            die_usage("%s needs a value", flag_name(i));
        for (const char *c = value, *end = c + strlen(c); c < end && i != FLAG_prompt; ) {
            uint32_t code;
            size_t n = utf8_decode(c, end, &code);
            if (!n) die_usage("%s: its value is not valid UTF-8, which log and checkpoint need",
                              flag_name(i));
            c += n;
        }
        flag_set(i, value);
        given[i] = 1;
    }
}

static const char *flag_text(size_t i) {                     // its value, as it can be read again
    const FlagSpec *s = &flag_specs[i];
    const char *field = (const char *)&flags + s->offset;
    if (s->type[0] == 'N') return str("%.17g", *(const double *)field);
    if (s->type[0] == 'I' || s->type[1] == 'w') return str("%" PRId64, *(const Int *)field);
    return *(const Str *)field ? *(const Str *)field : "";
}

// All flags as a JSON object
static void put_flags(Text *t) {
    for (size_t i = 0; i < FLAG_COUNT; i++) {
        const char *text = flag_text(i), *type = flag_specs[i].type;
        put(t, "%s\"%s\":", i ? "," : "{", flag_specs[i].name);
        if (!strcmp(type, "Switch")) put(t, *text == '1' ? "true" : "false");
        else if (*type == 'N' || *type == 'I') put(t, "%s", text);
        else put_json_string(t, text, strlen(text));
    }
    put(t, "}");
}

// Flags that belong to a command, not to a run
static int flag_is_momentary(size_t i) {
    const char *g = flag_specs[i].group;
    return !strcmp(g, "Inspect") || !strcmp(g, "Text") || i == FLAG_out || i == FLAG_resume
        || i == FLAG_threads || i == FLAG_init;
}

// Flags without which a resumed run would be another run
static int flag_is_fixed(size_t i) {
    const char *g = flag_specs[i].group;
    return ((!strcmp(g, "Data") || !strcmp(g, "Model")) && i != FLAG_chunk_size)
        || i == FLAG_batch || i == FLAG_seq_len || i == FLAG_accum || i == FLAG_carry;
}

// Flags that the user did not give are taken from the checkpoint; the others are compared with it.
static void restore_flags(const char *dir, const Json *state) {
    const Json *old = json_expect(json_get(state, "flags"), JSON_OBJECT, dir, "flags");
    for (size_t i = 0; i < FLAG_COUNT; i++) {
        const Json *v = json_get(old, flag_specs[i].name);
        if (flag_is_momentary(i) || !v) continue;
        char *then = v->kind == JSON_TRUE ? strdup("1") : v->kind == JSON_FALSE ? strdup("0")
                   : strndup(v->text, v->size), *now_ = strdup(flag_text(i));
        if (!given[i]) {
            if (i != FLAG_min_lr || !given[FLAG_lr]) flag_set(i, strdup(then));
        } else if (strcmp(then, now_)) {
            CHECK(!flag_is_fixed(i), "--resume: %s was trained with %s %s, now it is %s; a run can "
                  "only go on as it was", dir, flag_name(i), then, now_);
            printf("notice: %s is %s, it was %s\n", flag_name(i), now_, then);
        }
        free(then), free(now_);
    }
}
