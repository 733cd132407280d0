extern "C" int torch_threads();
int main() { return torch_threads() > 0 ? 0 : 1; }
