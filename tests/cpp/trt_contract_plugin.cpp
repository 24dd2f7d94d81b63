#include <dlfcn.h>

#include <cstring>

#include "contract_table.h"
#include "trt_contract_cases.h"
#include "trt_contract_mocks.h"

namespace hqmq::test {
namespace {

// One case with one type of activations.
class Tester {
 public:
  Tester(const Context& context, const Case& node, DataType activation)
      : context_(context), node_(node), activation_(activation) {}

  void Run() {
    Fields fields(node_.attributes);
    Plugin plugin(context_.creator->createPlugin("layer", fields.get(), TensorRTPhase::kBUILD));
    Check(plugin.whole() && context_.log->Silent(), "createPlugin: " + context_.log->Text());
    if (!plugin.whole()) return;
    TestNames(plugin);
    TestPlugin(plugin);
    TestSerialisation(plugin);
    TestClones(std::move(plugin));
    Check(context_.log->Silent(), "messages of calls that worked: " + context_.log->Text());
    context_.log->Clear();
  }

 private:
  using Shapes = std::vector<std::vector<Axis>>;

  void Check(bool holds, const std::string& what) { context_.report->Check(holds, what); }
  int32_t num_inputs() const { return static_cast<int32_t>(node_.inputs.size()); }
  int32_t num_outputs() const { return static_cast<int32_t>(node_.outputs.size()); }

  // Calls that fail: not 0, and one error in the log that holds `word`.
  void Fails(int32_t code, const std::string& what, const std::string& word = "") {
    const std::string text = context_.log->Text();
    const std::string error = context_.log->TakeError();
    Check(code != 0, what + " returned 0");
    Check(!error.empty() && error.find("'layer'") != std::string::npos &&
              error.find(word) != std::string::npos,
          what + ": expected one error that names the layer and says '" + word + "', got: " + text);
  }

  void TestNames(const Plugin& plugin) {
    Check(node_.op == plugin.core->getPluginName(), "name");
    Check(!strcmp(plugin.core->getPluginVersion(), contract::kPluginVersion), "version");
    Check(!strcmp(plugin.core->getPluginNamespace(), contract::kDomain), "namespace");
    const InterfaceInfo build = plugin.build->getInterfaceInfo();
    Check(!strcmp(build.kind, "PLUGIN_V3ONE_BUILD") && build.major == 2,
          "build interface is not V2");
    Check(!strcmp(plugin.runtime->getInterfaceInfo().kind, "PLUGIN_V3ONE_RUNTIME"), "runtime");
  }

  void TestPlugin(const Plugin& plugin) {
    Check(plugin.build->getNbOutputs() == num_outputs(), "number of outputs");
    TestTypes(plugin);
    TestShapes(plugin);
    TestFormats(plugin);
    for (int32_t i = 0; i < num_outputs(); ++i) {
      Check(plugin.build->getAliasedInput(i) == node_.outputs[i].alias,
            "alias of " + node_.outputs[i].name);
    }
    Check(plugin.build->getAliasedInput(-1) < 0 && plugin.build->getAliasedInput(99) < 0,
          "alias of no output");
    TestWorkspace(plugin);
    TestRuntimeShapes(plugin);
    TestEnqueue(plugin);
  }

  std::vector<DataType> InputTypes() const {
    std::vector<DataType> types;
    for (const Node& input : node_.inputs) types.push_back(TypeOf(input, activation_));
    return types;
  }

  void TestTypes(const Plugin& plugin) {
    std::vector<DataType> in = InputTypes(), out(num_outputs(), DataType::kUINT8);
    const auto call = [&](int32_t inputs, int32_t outputs) {
      return plugin.build->getOutputDataTypes(out.data(), outputs, in.data(), inputs);
    };
    Check(call(num_inputs(), num_outputs()) == 0, "getOutputDataTypes: " + context_.log->Text());
    for (int32_t i = 0; i < num_outputs(); ++i)
      Check(out[i] == TypeOf(node_.outputs[i], activation_), "type of " + node_.outputs[i].name);
    Fails(call(num_inputs() - 1, num_outputs()), "types with an input less");
    Fails(call(num_inputs(), num_outputs() - 1), "types with an output less");
    for (int32_t i = 0; i < num_inputs(); ++i) {
      in = InputTypes();
      in[i] = DataType::kINT64;
      Fails(call(num_inputs(), num_outputs()), node_.inputs[i].name + " of int64", "int64");
    }
  }

  int32_t OutputShapes(const Plugin& plugin, const Shapes& shapes, std::vector<DimsExprs>* outputs,
                       MockBuilder* builder) {
    std::vector<DimsExprs> in(shapes.size());
    for (size_t i = 0; i < shapes.size(); ++i) {
      in[i].nbDims = static_cast<int32_t>(shapes[i].size());
      for (size_t k = 0; k < shapes[i].size(); ++k) in[i].d[k] = builder->Make(shapes[i][k]);
    }
    outputs->assign(num_outputs(), {});
    return plugin.build->getOutputShapes(in.data(), num_inputs(), nullptr, 0, outputs->data(),
                                         num_outputs(), *builder);
  }

  Shapes InputShapes() const {
    Shapes shapes;
    for (const Node& input : node_.inputs) shapes.push_back(input.shape);
    return shapes;
  }

  void TestShapes(const Plugin& plugin) {
    MockBuilder builder;
    std::vector<DimsExprs> out;
    Check(OutputShapes(plugin, InputShapes(), &out, &builder) == 0,
          "getOutputShapes: " + context_.log->Text());
    for (int32_t i = 0; i < num_outputs(); ++i) {
      const Node& output = node_.outputs[i];
      bool same = out[i].nbDims == static_cast<int32_t>(output.shape.size());
      for (int32_t k = 0; same && k < out[i].nbDims; ++k) {
        const auto* dim = static_cast<const MockDim*>(out[i].d[k]);
        same =
            dim && dim->size() == output.shape[k].size && dim->dynamic() == output.shape[k].dynamic;
      }
      Check(same, "shape of " + output.name);
    }
    EachWrongShape(false, [&](const Shapes& shapes, const std::string& what) {
      Fails(OutputShapes(plugin, shapes, &out, &builder), "getOutputShapes with " + what);
    });
  }

  // Each size that others depend on made larger and smaller by one, and each rank; and tails
  // without rows for the sink tokens.
  template <class Function>
  void EachWrongShape(bool runtime, Function function) {
    for (int32_t i = 0; i < num_inputs(); ++i) {
      const Node& input = node_.inputs[i];
      for (size_t k = 0; k < input.shape.size(); ++k) {
        if (input.shape[k].alone || (input.shape[k].dynamic && !runtime)) continue;
        for (const int off : {1, -1}) {
          Shapes shapes = InputShapes();
          shapes[i][k].size += off;
          function(shapes, (off > 0 ? "a larger dimension " : "a smaller dimension ") +
                               std::to_string(k) + " of " + input.name);
        }
      }
      if (const int64_t sinks = SinkTokens(input); sinks > 0) {
        Shapes shapes = InputShapes();
        shapes[i][2].size -= sinks;
        function(shapes, "no rows for sink tokens in " + input.name);
      }
      Shapes shapes = InputShapes();
      shapes[i].push_back({1, false, false});
      function(shapes, "a dimension more of " + input.name);
    }
  }

  int32_t Attribute(const std::string& name) const {
    for (const Value& value : node_.attributes) {
      if (value.name == name) return value.i;
    }
    return 0;
  }

  // Sink tokens of the role whose tail this is; 0 of other tensors.
  int64_t SinkTokens(const Node& tensor) const {
    if (tensor.name == "tail") return Attribute("sink_tokens");
    if (tensor.name == "key_tail") return Attribute("k_sink_tokens");
    return tensor.name == "value_tail" ? Attribute("v_sink_tokens") : 0;
  }

  std::vector<DynamicPluginTensorDesc> Descriptions(int64_t scale = 1) const {
    std::vector<DynamicPluginTensorDesc> all;
    for (const auto* nodes : {&node_.inputs, &node_.outputs}) {
      for (const Node& node : *nodes) {
        DynamicPluginTensorDesc one = {};
        one.desc.type = TypeOf(node, activation_);
        one.desc.format = TensorFormat::kLINEAR;
        one.desc.dims = one.min = one.opt = one.max = DimsOf(node.shape);
        for (size_t k = 0; k < node.shape.size(); ++k) {
          if (!node.shape[k].dynamic) continue;
          one.desc.dims.d[k] = -1;
          one.opt.d[k] = one.max.d[k] = scale * node.shape[k].size;
        }
        all.push_back(one);
      }
    }
    return all;
  }

  // TensorRT asks position by position; what comes after is not set yet.
  bool Supports(const Plugin& plugin, std::vector<DynamicPluginTensorDesc> all, int32_t position) {
    for (size_t i = position + 1; i < all.size(); ++i) all[i].desc.type = DataType::kUINT8;
    return plugin.build->supportsFormatCombination(position, all.data(), num_inputs(),
                                                   num_outputs());
  }

  void TestFormats(const Plugin& plugin) {
    const std::vector<DynamicPluginTensorDesc> right = Descriptions();
    for (int32_t i = 0; i < num_inputs() + num_outputs(); ++i) {
      const Node& node = i < num_inputs() ? node_.inputs[i] : node_.outputs[i - num_inputs()];
      Check(Supports(plugin, right, i), "format of " + node.name);
      for (const auto type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT32,
                              DataType::kINT64, DataType::kINT8, DataType::kBOOL}) {
        auto wrong = right;
        wrong[i].desc.type = type;
        const bool fits = type == right[i].desc.type ||
                          (i == 0 && node.type == "T" && type <= DataType::kHALF) ||
                          (i == 0 && node.type == "T" && type == DataType::kBF16);
        Check(Supports(plugin, wrong, i) == fits,
              "type " + std::to_string(static_cast<int>(type)) + " of " + node.name);
      }
      for (const auto format : {TensorFormat::kCHW2, TensorFormat::kHWC8, TensorFormat::kCHW32}) {
        auto wrong = right;
        wrong[i].desc.format = format;
        Check(!Supports(plugin, wrong, i), "a format that is not linear of " + node.name);
      }
    }
    const int32_t none = num_inputs() + num_outputs();
    Check(!plugin.build->supportsFormatCombination(-1, right.data(), num_inputs(), num_outputs()) &&
              !plugin.build->supportsFormatCombination(none, right.data(), num_inputs(),
                                                       num_outputs()),
          "format of no tensor");
    Check(
        !plugin.build->supportsFormatCombination(0, right.data(), num_inputs() + 1, num_outputs()),
        "format with an input more");
    Check(!context_.log->TakeError().empty(), "an input more is not logged");
  }

  void TestWorkspace(const Plugin& plugin) {
    size_t last = 0;
    for (const int64_t scale : {1, 2, 8}) {
      const auto all = Descriptions(scale);
      const auto* outputs = all.data() + num_inputs();
      Check(plugin.build->configurePlugin(all.data(), num_inputs(), outputs, num_outputs()) == 0,
            "configurePlugin: " + context_.log->Text());
      const size_t bytes =
          plugin.build->getWorkspaceSize(all.data(), num_inputs(), outputs, num_outputs());
      Check(bytes >= last && bytes < size_t{1} << 34, "workspace of " + std::to_string(bytes));
      Check(
          bytes == plugin.build->getWorkspaceSize(all.data(), num_inputs(), outputs, num_outputs()),
          "workspace is not the same twice");
      last = bytes;
    }
    if (node_.op == contract::kDequantize.name) Check(last == 0, "dequantising needs no workspace");
    if (node_.op == contract::kAttention.name) Check(last > 0, "attention needs a workspace");
    const auto all = Descriptions();
    Fails(plugin.build->configurePlugin(all.data(), num_inputs() - 1, all.data() + num_inputs(),
                                        num_outputs()),
          "configurePlugin with an input less");
  }

  std::vector<PluginTensorDesc> RuntimeDescriptions(const Shapes& shapes) const {
    std::vector<PluginTensorDesc> all;
    for (const auto& one : Descriptions()) all.push_back(one.desc);
    for (int32_t i = 0; i < num_inputs(); ++i) all[i].dims = DimsOf(shapes[i]);
    for (int32_t i = 0; i < num_outputs(); ++i)
      all[num_inputs() + i].dims = DimsOf(node_.outputs[i].shape);
    return all;
  }

  void TestRuntimeShapes(const Plugin& plugin) {
    const auto call = [&](const Shapes& shapes) {
      const auto all = RuntimeDescriptions(shapes);
      return plugin.runtime->onShapeChange(all.data(), num_inputs(), all.data() + num_inputs(),
                                           num_outputs());
    };
    Check(call(InputShapes()) == 0, "onShapeChange: " + context_.log->Text());
    EachWrongShape(true, [&](const Shapes& shapes, const std::string& what) {
      Fails(call(shapes), "onShapeChange with " + what);
    });
  }

  static bool HasGpu() {
    void* const driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver) return false;
    const auto start = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
    return start && start(0) == 0;
  }

  // Without a GPU nothing is read from these addresses; with one they must not be used.
  void TestEnqueue(const Plugin& plugin) {
    static const bool has_gpu = HasGpu();
    if (has_gpu) return;
    const auto all = RuntimeDescriptions(InputShapes());
    static char memory[2][256];
    for (const bool in_place : {true, false}) {
      const std::vector<const void*> inputs(num_inputs(), memory[0]);
      const std::vector<void*> outputs(num_outputs(), memory[in_place ? 0 : 1]);
      for (void* const workspace : {static_cast<void*>(memory[0]), static_cast<void*>(nullptr)}) {
        const int32_t code =
            plugin.runtime->enqueue(all.data(), all.data() + num_inputs(), inputs.data(),
                                    outputs.data(), workspace, nullptr);
        Check(code != 0, "enqueue worked without a GPU");
        const std::string text = context_.log->Text();
        Check(text.find("'layer'") != std::string::npos, "enqueue logged: " + text);
        context_.log->Clear();
      }
    }
  }

  static std::string FieldText(const PluginFieldCollection* fields) {
    std::string text;
    for (int32_t i = 0; fields && i < fields->nbFields; ++i) {
      const PluginField& field = fields->fields[i];
      text += std::string(field.name) + " " + std::to_string(static_cast<int>(field.type)) + " " +
              std::to_string(field.length) + " ";
      for (int b = 0; field.data && b < 4; ++b)
        text += std::to_string(static_cast<const unsigned char*>(field.data)[b]) + ",";
      text += "\n";
    }
    return text;
  }

  void TestSerialisation(const Plugin& plugin) {
    Fields given(node_.attributes);
    const std::string wanted = FieldText(given.get());
    const PluginFieldCollection* const fields = plugin.runtime->getFieldsToSerialize();
    Check(FieldText(fields) == wanted, "fields to serialise are not the attributes in order");
    Plugin again(context_.creator->createPlugin("layer", fields, TensorRTPhase::kRUNTIME));
    Check(again.whole() && FieldText(again.runtime->getFieldsToSerialize()) == wanted,
          "the round trip changed the fields");
    if (again.whole()) TestPlugin(again);
  }

  void TestClones(Plugin plugin) {
    Fields given(node_.attributes);
    const std::string wanted = FieldText(given.get());
    Plugin clone(plugin.object->clone());
    Plugin attached(plugin.runtime->attachToContext(nullptr));
    bool own = true;
    for (Plugin* copy : {&clone, &attached}) {
      Check(copy->whole(), "clone and attachToContext give a plugin");
      Check(copy->object != plugin.object, "clone and attachToContext give another plugin");
      own = own && copy->whole() && copy->object != plugin.object;
      if (copy->object == plugin.object) static_cast<void>(copy->object.release());
    }
    if (!own) return;
    plugin.object.reset();
    for (const Plugin* copy : {&clone, &attached}) {
      Check(FieldText(copy->runtime->getFieldsToSerialize()) == wanted, "fields of a copy");
      TestPlugin(*copy);
    }
  }

  Context context_;
  const Case& node_;
  DataType activation_;
};

}  // namespace

void TestPlugin(const Context& context, const Case& node, DataType activation) {
  Tester(context, node, activation).Run();
}

}  // namespace hqmq::test
