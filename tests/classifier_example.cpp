#include <cstdio>

#include <faiss_saap/PartitionSet.h>
#include <faiss_saap/Trace.h>
#include <faiss_saap/train_partition.h>

using namespace faiss_saap;

int main(int argc, char** argv) {
    if (argc < 2) return 1;
    std::vector<Trace> texts; // the last one is held out
    for (int i = 1; i < argc; i++) texts.emplace_back(argv[i]);

    TrainingParams params;
    params.ncell = 64, params.width = 32, params.steps = 100, params.batch = 64; // tiny: seconds
    const int layer = 9, kv_head = 0;
    TrainedPartition trained = train_partition(texts, layer, kv_head, params);
    for (const HeldOut& head : trained.heads)
        std::printf("recall %.3f of %.3f possible\n", head.recall, head.ceiling);

    PartitionSet set;
    set.model = texts[0].model, set.rope = texts[0].rope;
    set.sink = params.sink, set.window = params.window, set.seed = params.seed;
    for (const Trace& t : texts) set.texts.push_back(t.text);
    set.partitions = {trained};
    write_partitions(set, "example.saap");

    // Where one sequence is decoded: give it to an AttentionAdapter, or ask.
    PartitionSet read = read_partitions("example.saap");
    read.check_rope(texts[0].rope);
    const Partition& partition = read.find(layer, kv_head).partition;
    std::vector<float> query(partition.d(), .5f); // pre-RoPE
    int32_t head = 0, cells[4];                   // query head within the group
    RoutingInput input;
    input.n = 1, input.d = partition.d(), input.pre_rope = query.data(), input.head = &head;
    partition.query->assign(input, nullptr, 4, cells, nullptr);
    std::printf("cells %d %d %d %d\n", cells[0], cells[1], cells[2], cells[3]);
    std::remove("example.saap");
}
